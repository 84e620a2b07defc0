// Two sessions compared: where their tokens part, which blocks they share, and the tokens there, if asked for.

import { ask, RefusedError } from "./api.js";
import { announce, el, find, say } from "./dom.js";
import { bytes, plural } from "./text.js";

export const SHORT = 12; // digits of an id, as `thaw log` has them
const TOKENS = 16; // of each side, before and after
const WORDS = { prompt: "how many tokens were given", sampling: "sampling parameters", model: "the model", salt: "the salt" };

const TURNING = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g; // characters that would turn the words after them

// Within a sentence.
export function nameOf(session) {
  const plain = (label) => label.replace(TURNING, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
  return session.labels.map(plain).join(", ") || session.id.slice(0, SHORT);
}

export class Comparison {
  // `failed` is called with what a request raised, `none` to have no session chosen, `changed` where a comparison is
  // there or failed.
  constructor({ failed, none, changed }) {
    this.failed = failed;
    this.changed = changed;
    this.node = find("#comparison");
    this.said = el("p", { class: "verdict" });
    this.table = el("table", { role: "table" });
    this.shared = el("p", { class: "hint" });
    this.tokens = el("dl", { class: "tokens", hidden: true });
    this.button = el("button", { type: "button", "aria-expanded": "false", on: { click: () => this.toggle() } }, "Show tokens");
    const clear = el("button", { type: "button", on: { click: none } }, "Choose none");
    this.node.append(this.said, this.table, this.shared, el("div", { class: "buttons" }, this.button, clear), this.tokens);
    this.key = ""; // ids of what is shown or asked for
    this.pair = [];
    this.refused = { key: "", why: "" };
  }

  get there() {
    return !this.node.hidden;
  }

  // Of fewer than two there is nothing to show. What failed is asked for again.
  async show(pair) {
    const key = pair.map((session) => session.id).join(" ");
    if (key !== this.refused.key) this.refused = { key: "", why: "" };
    if (key === this.key) return;
    this.key = key;
    this.pair = pair;
    this.node.hidden = true;
    this.hideTokens();
    if (pair.length < 2) return;
    let found;
    try {
      found = await this.asked("");
    } catch (error) {
      if (key === this.key) this.unanswered(error);
      return;
    }
    if (key !== this.key) return; // others are chosen by now
    this.fill(found);
    this.refused = { key: "", why: "" };
    this.node.hidden = false;
    this.changed();
    this.node.scrollIntoView({ block: "nearest" });
    announce(this.said.textContent);
  }

  asked(more) {
    const [a, b] = this.pair.map((session) => encodeURIComponent(session.id));
    return ask(`v1/thaw/sessions/diff?a=${a}&b=${b}${more}`);
  }

  // A reason is announced once, however often it is given.
  unanswered(error) {
    const { key } = this;
    this.key = "";
    if (!(error instanceof RefusedError) || error.status === 403) {
      this.failed(error);
      return;
    }
    if (error.message !== this.refused.why) announce(error.message);
    this.refused = { key, why: error.message };
    this.changed();
  }

  fill(found) {
    const names = namesOf(this.pair);
    say(this.said, verdict(found, names));
    const heads = this.pair.map((session, index) =>
      el("th", { role: "columnheader", scope: "col" }, el("span", { class: "name" }, names[index]), " ", el("code", {}, session.id)),
    );
    const own = found.own_blocks.map((count, index) => `${plural(count, "block")}, ${bytes(found.own_bytes[index])}`);
    this.table.replaceChildren(
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, el("td", { role: "cell" }), ...heads)),
      el(
        "tbody",
        { role: "rowgroup" },
        line("Tokens", found.tokens),
        line("Tokens of its own", found.tokens.map((count) => count - found.common)),
        line("Blocks of its own", own),
      ),
    );
    const parts = [`They share ${plural(found.shared_blocks, "block")}, ${bytes(found.shared_bytes)}.`];
    if (!found.comparable) parts.push("Their blocks were made by other weights, runtimes or salts, and cannot be shared.");
    if (found.other.length) parts.push(`They differ in ${found.other.map((name) => WORDS[name] ?? name).join(", ")}.`);
    say(this.shared, parts.join(" "));
  }

  async toggle() {
    if (!this.tokens.hidden) {
      this.hideTokens();
      return;
    }
    const { key } = this;
    let found;
    try {
      found = await this.asked(`&tokens=${TOKENS}`);
    } catch (error) {
      if (key === this.key) this.failed(error, "Comparing: ");
      return;
    }
    if (key !== this.key) return;
    const { from, common, a, b } = found.token_ids;
    const names = namesOf(this.pair);
    this.tokens.replaceChildren(
      ...listed(`Both, from token ${from}`, common, false),
      ...listed(`${names[0]}, from token ${found.common}`, a, found.tokens[0] > found.common + a.length),
      ...listed(`${names[1]}, from token ${found.common}`, b, found.tokens[1] > found.common + b.length),
    );
    this.tokens.hidden = false;
    say(this.button, "Hide tokens");
    this.button.setAttribute("aria-expanded", "true");
  }

  hideTokens() {
    this.tokens.hidden = true;
    this.tokens.replaceChildren();
    say(this.button, "Show tokens");
    this.button.setAttribute("aria-expanded", "false");
  }
}

// Labels, where these tell them apart.
function namesOf(pair) {
  const names = pair.map(nameOf);
  return names[0] === names[1] ? pair.map((session) => session.id.slice(0, SHORT)) : names;
}

function verdict({ first_difference: first, tokens }, names) {
  if (first === null) return `${names[0]} and ${names[1]} have the same ${plural(tokens[0], "token")}.`;
  const short = tokens.indexOf(first);
  const parted = `${names[0]} and ${names[1]} part after ${plural(first, "token")}`;
  return short < 0
    ? `${parted}: token ${first}, counted from 0, is the first that differs.`
    : `${parted}: ${names[short]} is the beginning of ${names[1 - short]}.`;
}

function line(name, values) {
  const cells = values.map((value) => el("td", { role: "cell" }, String(value)));
  return el("tr", { role: "row" }, el("th", { role: "rowheader", scope: "row" }, name), ...cells);
}

function listed(name, ids, more) {
  const text = ids.length ? `${ids.join(" ")}${more ? " …" : ""}` : "none";
  return [el("dt", {}, name), el("dd", {}, el("code", {}, text))];
}
