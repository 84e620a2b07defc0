// Snapshots and files of KV blocks: what they are, and whether they are sound.

import { ask } from "./api.js";
import { announce, cell, el, find, keyed, say } from "./dom.js";
import { bytes, clock, percent, seconds } from "./text.js";

const key = (what) => JSON.stringify(Object.entries(what));

export class Snapshots {
  // `asked` is called after a button's work; `failed` with what it raised.
  constructor({ asked, failed }) {
    this.asked = asked;
    this.failed = failed;
    this.weights = new Table(find("#snapshots .list"), "Snapshot", this);
    this.kv = new Table(find("#kv .list"), "File", this);
    this.state = { running: null, results: [] };
  }

  update({ snapshots }) {
    this.weights.update(snapshots, "No model has a snapshot, and the server has no --model-dir with any.");
    this.verification(this.state);
  }

  updateKV({ directory, files }) {
    this.kv.update(files, directory ? "There are none in --kv-dir." : "Start the server with --kv-dir to see them here.");
    this.verification(this.state);
  }

  verification(state) {
    this.state = state;
    for (const table of [this.weights, this.kv]) table.verification(state);
  }

  get running() {
    return this.state.running !== null;
  }

  async ask(path, what) {
    try {
      this.verification(await ask(path, what));
    } catch (error) {
      this.failed(error, "Verification: ");
    }
    this.asked();
  }
}

class Table {
  constructor(place, first, owner) {
    this.owner = owner;
    this.rows = new Map();
    this.body = el("tbody", { role: "rowgroup" });
    const heads = [first, "Size", "Model id", "Content id", "Engine", "Verification"];
    const head = heads.map((text) =>
      el("th", { role: "columnheader", scope: "col", class: text === "Size" ? "number" : null }, text),
    );
    this.table = el(
      "table",
      { role: "table", class: "cards" },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...head)),
      this.body,
    );
    this.empty = el("p", { class: "empty" });
    place.append(this.table, this.empty);
  }

  update(found, none) {
    say(this.empty, found.length ? "" : none);
    this.empty.hidden = found.length > 0;
    this.table.hidden = found.length === 0;
    const keys = found.map((one) => key(one.what));
    keyed(this.body, this.rows, keys, () => new Row(this.owner));
    found.forEach((one, index) => this.rows.get(keys[index]).update(one));
  }

  verification({ running, results }) {
    const last = new Map(results.map((result) => [key(result.what), result]));
    for (const [name, row] of this.rows) {
      row.verification(running !== null && key(running.what) === name ? running : null, running !== null, last.get(name));
    }
  }
}

class Row {
  constructor(owner) {
    this.owner = owner;
    this.name = el("span", { class: "name" });
    this.tags = el("span", { class: "tags" });
    this.size = cell("Size", "number");
    this.model = new Id();
    this.content = new Id();
    this.engine = cell("Engine", "engine");
    this.progress = el("progress", { max: 1 });
    this.said = el("p", { class: "result" });
    this.button = el("button", { type: "button", on: { click: () => this.press() } }, "Verify");
    this.node = el(
      "tr",
      { role: "row" },
      el("th", { role: "rowheader", scope: "row" }, this.name, this.tags),
      this.size,
      cell("Model id", "id", this.model.node),
      cell("Content id", "id", this.content.node),
      this.engine,
      cell("Verification", "verify", el("div", {}, el("div", {}, this.progress, this.said), this.button)),
    );
  }

  update(one) {
    this.what = one.what;
    this.text = one.path ?? one.name;
    say(this.name, this.text);
    say(this.tags, one.error ?? (one.models?.length ? `serves ${one.models.join(", ")}` : ""));
    this.node.classList.toggle("broken", Boolean(one.error));
    say(this.size, one.bytes === undefined ? "–" : bytes(one.bytes));
    this.model.update(one.model, `model id of ${this.text}`);
    this.content.update(one.content, `content id of ${this.text}`);
    say(this.engine, one.engine ? `${one.engine} ${one.engine_version ?? ""}`.trim() : "–");
    this.progress.setAttribute("aria-label", `${this.text}: how far its verification is`);
  }

  verification(mine, busy, result) {
    this.mine = mine;
    say(this.button, mine ? "Cancel" : "Verify");
    this.button.setAttribute("aria-label", `${mine ? "Cancel verifying" : "Verify"} ${this.text}`);
    this.button.setAttribute("aria-disabled", String(busy && !mine));
    this.progress.hidden = !mine;
    this.said.dataset.kind = mine || !result ? "" : result.error ? "failed" : "ready";
    if (mine) {
      this.progress.value = mine.total ? mine.done / mine.total : 0;
      say(this.said, mine.total ? `${percent(mine.done / mine.total)} of ${bytes(mine.total)}` : "beginning");
    } else if (!result) say(this.said, "not verified since the server's start");
    else if (result.error) say(this.said, `not sound: ${result.error}`);
    else say(this.said, `sound, ${bytes(result.bytes)} in ${seconds(result.seconds)}, at ${clock(result.time)}`);
  }

  press() {
    if (this.button.getAttribute("aria-disabled") === "true") return;
    if (this.mine) this.owner.ask("v1/thaw/verify/cancel", {});
    else this.owner.ask("v1/thaw/verify", this.what);
  }
}

// The beginning of a long id; pressed, all of it.
class Id {
  constructor() {
    this.open = false;
    this.node = el("button", { type: "button", class: "id", on: { click: () => this.toggle() } });
  }

  update(id, what) {
    this.id = id ?? null;
    this.label = what;
    this.show();
  }

  toggle() {
    this.open = !this.open;
    this.show();
    if (this.open) announce(`${this.label}: ${this.id}`);
  }

  show() {
    this.node.disabled = this.id === null;
    const short = this.id?.replace(/^[a-z0-9]+:/, "").slice(0, 12);
    say(this.node, this.id === null ? "–" : this.open ? this.id : `${short}…`);
    this.node.setAttribute("aria-expanded", String(this.open));
    this.node.setAttribute("aria-label", this.id === null ? `no ${this.label}` : `${this.label}, ${short}`);
    this.node.title = this.id ?? "";
  }
}
