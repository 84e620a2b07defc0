// Elements made and changed without HTML text: whatever a server says stays text.

const SVG = "http://www.w3.org/2000/svg";

export function el(tag, given = {}, ...children) {
  return fill(document.createElement(tag), given, children);
}

export function svg(tag, given = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), given, children);
}

function fill(node, given, children) {
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") {
      for (const [what, work] of Object.entries(value)) node.addEventListener(what, work);
    } else {
      node.setAttribute(name, value === true ? "" : value);
    }
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Text is written only where it changes: a selection stays, and nothing is announced anew.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
  return node;
}

export function find(selector, within = document) {
  return within.querySelector(selector);
}

// Makes `parent` hold the nodes of these keys in this order; `make` is called for new keys only, so that whatever has
// the focus keeps it.
export function keyed(parent, kept, keys, make) {
  const wanted = new Set(keys);
  for (const [key, made] of kept) {
    if (!wanted.has(key)) {
      made.node.remove();
      kept.delete(key);
    }
  }
  let before = null;
  for (const key of keys) {
    if (!kept.has(key)) kept.set(key, make(key));
    const { node } = kept.get(key);
    const place = before === null ? parent.firstChild : before.nextSibling;
    if (node !== place) parent.insertBefore(node, place);
    before = node;
  }
}

// A cell of a table that becomes a list of cards on a narrow screen.
export function cell(label, kind, ...children) {
  return el("td", { role: "cell", "data-label": label, class: kind }, ...children);
}

const announced = () => find("#said");

export function announce(text) {
  say(announced(), text);
}
