// The sessions that engines keep, as the tree that they are; two that are chosen are compared.

import { Comparison, nameOf, SHORT } from "./comparison.js";
import { announce, el, find, keyed, say } from "./dom.js";
import { bytes, plural, seconds } from "./text.js";

export class Sessions {
  // `failed` is called with what a comparison raised.
  constructor({ failed }) {
    this.section = find("#sessions");
    this.error = find(".error", this.section);
    this.hint = find(".hint", this.section);
    this.tree = find("[role=tree]", this.section);
    this.note = find(".note", this.section);
    this.broken = find(".unreadable", this.section);
    this.rows = new Map();
    this.order = []; // ids, from above
    this.chosen = [];
    this.at = null; // whom the tab key leads to
    this.comparison = new Comparison({ failed, none: () => this.choose(null), changed: () => this.hinted() });
    this.tree.addEventListener("keydown", (event) => this.key(event));
    this.tree.addEventListener("click", (event) => this.click(event));
  }

  get there() {
    return !this.section.hidden;
  }

  // What was there last may be read, and not be chosen.
  refused(error) {
    this.section.hidden = false;
    say(this.error, error.message);
    this.stale(true);
    this.hinted();
  }

  stale(is) {
    this.section.classList.toggle("stale", is);
    this.tree.setAttribute("aria-disabled", String(is));
  }

  update({ directory, time, sessions, broken, left_out: others }) {
    this.section.hidden = !directory;
    say(this.error, "");
    this.stale(false);
    const places = placed(sessions);
    const focused = document.activeElement;
    const held = this.tree.contains(focused);
    this.order = [...places.keys()];
    keyed(this.tree, this.rows, this.order, (id) => new Row(id));
    const models = new Set(sessions.map((session) => session.model)).size;
    for (const [id, place] of places) this.rows.get(id).update(place, time, models > 1);
    if (focused !== document.activeElement && focused?.isConnected) focused.focus({ preventScroll: true }); // its row was moved
    this.tree.hidden = sessions.length === 0;
    say(this.note, others ? `The ${sessions.length} that were used last are shown; ${others} are left out, which thaw log shows.` : "");
    this.broken.replaceChildren(
      ...Object.entries(broken).map(([id, why]) => el("li", {}, el("code", {}, id.slice(0, SHORT)), ` cannot be read: ${why}`)),
    );
    if (!this.rows.has(this.at)) this.at = null;
    this.mark(this.chosen.filter((id) => this.rows.has(id)));
    if (held && !focused.isConnected) this.back();
  }

  // Null: none. Of three the first is let go.
  choose(id) {
    if (id !== null && this.section.classList.contains("stale")) return;
    if (id === null) this.mark([]);
    else if (this.chosen.includes(id)) this.mark(this.chosen.filter((one) => one !== id));
    else this.mark([...this.chosen, id].slice(-2));
  }

  mark(chosen) {
    this.chosen = chosen;
    for (const [id, row] of this.rows) {
      row.node.setAttribute("aria-selected", String(chosen.includes(id)));
      row.node.tabIndex = id === (this.at ?? this.order[0]) ? 0 : -1;
    }
    const held = this.comparison.node.contains(document.activeElement);
    this.comparison.show(chosen.map((id) => this.rows.get(id).session));
    this.hinted();
    if (held && !this.comparison.there) this.back();
  }

  // To where the tab key leads, from what is there no more.
  back() {
    find("[tabindex='0']", this.tree)?.focus();
    announce(this.hint.textContent);
  }

  hinted() {
    const [first] = this.chosen.map((id) => this.rows.get(id).session);
    const { there, refused } = this.comparison;
    if (this.section.classList.contains("stale")) say(this.hint, this.rows.size ? "This is what was there last; none can be chosen now." : "");
    else if (this.rows.size === 0) say(this.hint, "None is kept yet: POST to v1/thaw/models/NAME/sessions/checkpoint keeps what a conversation has come to.");
    else if (first === undefined) say(this.hint, "Choose two to compare them, by a click or with the space bar.");
    else if (this.chosen.length === 1) say(this.hint, `${nameOf(first)} is chosen; choose another to compare them.`);
    else if (there) say(this.hint, "Two are chosen, and compared below.");
    else say(this.hint, refused.why ? `Two are chosen, and could not be compared: ${refused.why}` : "Two are chosen.");
  }

  click(event) {
    const row = event.target.closest("[role=treeitem]");
    if (row === null || !getSelection().isCollapsed) return; // text is being selected
    this.at = row.dataset.id;
    this.choose(this.at);
  }

  key(event) {
    const row = event.target.closest("[role=treeitem]");
    if (row === null || event.altKey || event.ctrlKey || event.metaKey) return;
    const { id } = row.dataset;
    const number = this.order.indexOf(id);
    const next = this.order[number + 1];
    const to = {
      ArrowDown: next,
      ArrowUp: this.order[number - 1],
      ArrowLeft: this.rows.get(id).parent,
      ArrowRight: this.rows.get(next)?.parent === id ? next : null,
      Home: this.order[0],
      End: this.order.at(-1),
    };
    if (event.key === " " || event.key === "Enter") {
      this.choose(id);
      if (this.chosen.length < 2) announce(this.hint.textContent);
    } else if (event.key in to) this.go(to[event.key]);
    else return;
    event.preventDefault();
  }

  go(id) {
    if (!this.rows.has(id)) return;
    this.at = id;
    for (const [other, row] of this.rows) row.node.tabIndex = other === id ? 0 : -1;
    this.rows.get(id).node.focus();
  }
}

// By id, from above: the tree with the newest session first, in it each session after the one that it continues. `last`
// says for each fork on the way to a session whether it is of the last branch there.
function placed(sessions) {
  const children = new Map();
  const trees = [];
  for (const session of sessions) {
    const above = session.depth ? session.parent : null;
    if (!children.has(above)) children.set(above, []);
    children.get(above).push(session);
    if (above === null) trees.push([]);
    trees.at(-1).push(session);
  }
  const newest = (tree) => Math.max(...tree.map((session) => session.created));
  trees.sort((a, b) => newest(b) - newest(a));
  const found = new Map();
  trees.flat().forEach((session) => {
    const above = session.depth ? session.parent : null;
    const siblings = above === null ? trees.map(([first]) => first) : children.get(above);
    const number = siblings.indexOf(session);
    const forks = above !== null && siblings.length > 1;
    const before = found.get(above)?.last ?? [];
    const last = forks ? [...before, number === siblings.length - 1] : before;
    found.set(session.id, { session, above: found.get(above)?.session ?? null, number: number + 1, siblings: siblings.length, forks, last });
  });
  return found;
}

class Row {
  constructor(id) {
    this.rails = el("span", { class: "rails", "aria-hidden": "true" });
    this.drawn = "";
    this.name = el("span", { class: "name" });
    this.id = el("code", {}, id.slice(0, SHORT));
    this.tokens = el("b", {});
    this.state = el("span", { class: "badge" });
    this.about = el("span", { class: "hint" });
    this.error = el("span", { class: "error" });
    this.node = el(
      "li",
      { role: "treeitem", "data-id": id, "aria-selected": "false", tabindex: -1, title: id },
      this.rails,
      el("span", { class: "mark", "aria-hidden": "true" }),
      el(
        "span",
        { class: "session" },
        el("span", {}, this.name, " ", this.id, " ", this.tokens, " ", this.state),
        " ",
        this.about,
        " ",
        this.error,
      ),
    );
  }

  update({ session, above, number, siblings, forks, last }, time, several) {
    this.session = session;
    this.parent = above?.id ?? null;
    this.node.setAttribute("aria-level", session.depth + 1);
    this.node.setAttribute("aria-posinset", number);
    this.node.setAttribute("aria-setsize", siblings);
    this.draw(last, forks, above !== null);
    say(this.name, session.labels.join(", "));
    say(this.tokens, plural(session.tokens, "token"));
    say(this.state, session.finished === null ? "open" : `finished: ${session.finished}`);
    this.state.dataset.kind = session.finished === null ? "" : "ready";
    const parts = [];
    if (session.parent !== null) {
      const parent = above === null ? `${session.parent.slice(0, SHORT)}, which is not shown` : nameOf(above);
      parts.push(`from token ${session.fork} of ${parent}`);
    }
    parts.push(`${session.prompt} given`, ...keptOf(session));
    if (session.expires !== null) parts.push(session.expires > time ? `expires in ${seconds(session.expires - time)}` : "expired");
    if (session.pinned) parts.push("pinned");
    if (several) parts.push(`model ${session.model.replace(/^[a-z0-9-]+:/, "").slice(0, SHORT)}`);
    parts.push(`made ${seconds(Math.max(0, time - session.created))} ago`);
    say(this.about, parts.join(" · "));
    say(this.error, session.error ?? "");
  }

  draw(last, forks, below) {
    const kinds = last.map((ends, index) => {
      if (forks && index === last.length - 1) return ends ? "end" : "tee";
      return ends ? "gap" : "line";
    });
    if (below && !forks) kinds.push("next");
    const drawn = kinds.join(" ");
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    this.rails.replaceChildren(...kinds.map((kind) => el("i", { class: kind })));
  }
}

function keptOf(session) {
  if (session.error !== undefined) return [];
  if (session.blocks === 0) return ["none in blocks"];
  const own = session.shared_bytes ? `, ${bytes(session.bytes - session.shared_bytes)} of its own` : "";
  return [`${session.blocks * session.block_size} in blocks, ${bytes(session.bytes)}${own}`];
}
