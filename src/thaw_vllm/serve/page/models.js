// The table of models: what their engines are doing, who waits, and the buttons.

import { ask } from "./api.js";
import { announce, cell, el, find, keyed, say } from "./dom.js";
import { percent, plural, rate, seconds } from "./text.js";

const CHANGING = ["starting", "swapping", "waking", "parking", "stopping"];
const KINDS = {
  ready: "ready",
  starting: "busy",
  swapping: "busy",
  waking: "busy",
  parking: "going",
  stopping: "going",
  parked: "parked",
  failed: "failed",
};

export class Models {
  // `asked` is called after a button's work; `failed` with what it raised.
  constructor({ asked, failed }) {
    this.body = find("#models tbody");
    this.memory = find("#memory");
    this.rows = new Map();
    this.parts = new Map();
    this.began = new Map();
    this.asked = asked;
    this.failed = failed;
    this.offset = 0;
    setInterval(() => this.tick(), 200);
  }

  // When a change began is what the events say.
  heard(event) {
    if (CHANGING.includes(event.event)) this.began.set(event.model, event);
  }

  // Another server's events are no longer true.
  anew() {
    this.began.clear();
  }

  now() {
    return Date.now() / 1000 + this.offset;
  }

  update(status) {
    this.offset = status.time - Date.now() / 1000;
    const names = Object.keys(status.models);
    keyed(this.body, this.rows, names, (name) => new Row(name, this));
    for (const name of names) {
      const engines = status.engines.filter((engine) => engine.model === name);
      this.rows.get(name).update(status.models[name], engines);
    }
    this.fillMemory(status, names);
    this.tick();
  }

  rates(found) {
    for (const [name, row] of this.rows) say(row.rate, rate(found.get(name)?.generation ?? 0));
  }

  tick() {
    for (const row of this.rows.values()) row.tick();
  }

  // What of the memory for engines is taken, and by whom.
  fillMemory(status, names) {
    const holding = status.engines.filter((engine) => engine.state !== "parked");
    const taken = Math.min(1, holding.reduce((sum, engine) => sum + engine.share, 0));
    const keys = holding.map((engine, index) => `${engine.pid ?? `new ${index}`}`);
    keyed(this.memory, this.parts, [...keys, "free"], () => ({ node: el("span", {}) }));
    holding.forEach((engine, index) => {
      const { node } = this.parts.get(keys[index]);
      node.className = `series-${names.indexOf(engine.model) % 8}`;
      node.style.setProperty("flex-grow", String(engine.share));
      say(node, engine.model);
      node.title = `${engine.model}: ${percent(engine.share)} of the memory for engines`;
    });
    const free = this.parts.get("free").node;
    free.className = "free";
    free.style.setProperty("flex-grow", String(1 - taken));
    free.hidden = taken > 0.999;
    say(free, `${percent(1 - taken)} free`);
    this.memory.setAttribute("role", "img");
    this.memory.setAttribute(
      "aria-label",
      `Memory for engines: ${holding.map((e) => `${e.model} ${percent(e.share)}`).join(", ") || "all free"}`,
    );
  }
}

class Row {
  constructor(name, table) {
    this.name = name;
    this.table = table;
    this.tags = el("span", { class: "tags" });
    this.states = el("div", { class: "states" });
    this.badges = new Map();
    this.progress = el("progress", { max: 1, "aria-label": `${name}: how far the change is` });
    this.why = el("p", { class: "why" });
    this.waiting = cell("Waiting", "number");
    this.flight = cell("In flight", "number");
    this.rate = cell("Tokens/s", "number", "0");
    this.share = cell("Share", "number");
    this.engine = cell("Engine", "engine");
    this.buttons = {
      load: this.button("Load", "load"),
      park: this.button("Park", "park"),
      unload: this.button("Unload", "unload"),
    };
    this.node = el(
      "tr",
      { role: "row" },
      el("th", { role: "rowheader", scope: "row" }, el("span", { class: "name" }, name), this.tags),
      cell("State", "state", this.states, this.progress, this.why),
      this.waiting,
      this.flight,
      this.rate,
      this.share,
      this.engine,
      cell("Actions", "buttons", ...Object.values(this.buttons)),
    );
  }

  button(text, what) {
    const label = `${text} ${this.name}`;
    return el("button", { type: "button", "aria-label": label, on: { click: () => this.ask(what) } }, text);
  }

  update(model, engines) {
    this.model = model;
    this.engines = engines;
    const waiting = model.waiting > 0 && engines.length === 0;
    const none = model.failure ? "failed" : waiting ? "waiting for room" : "not there";
    const states = engines.length ? engines.map((engine) => engine.state) : [none];
    keyed(this.states, this.badges, [...states.keys()], () => ({ node: el("span", { class: "badge" }) }));
    states.forEach((state, index) => {
      const { node } = this.badges.get(index);
      node.dataset.kind = KINDS[state] ?? "";
      node.dataset.state = state;
    });
    this.shown = states;
    const tags = [model.pinned && "pinned", model.minimum > 1 && `at least ${model.minimum}`, !model.snapshot && "no snapshot"].filter(Boolean);
    say(this.tags, tags.join(" · "));
    const why = (model.failure ?? "").replace(`the model '${this.name}' did not start: `, "");
    say(this.why, engines.length ? "" : why);
    say(this.waiting, String(model.waiting));
    say(this.flight, String(engines.reduce((sum, engine) => sum + engine.requests, 0)));
    say(this.share, percent(model.share));
    say(
      this.engine,
      engines
        .map((e) => `pid ${e.pid ?? "…"}${e.state === "ready" && e.idle_seconds >= 1 ? `, idle ${seconds(e.idle_seconds)}` : ""}`)
        .join("; ") || "–",
    );
    const has = (...wanted) => engines.some((engine) => wanted.includes(engine.state));
    this.enable("load", !has("ready", "starting", "swapping", "waking"));
    this.enable("park", engines.some((engine) => engine.state === "ready" && engine.parkable));
    this.enable("unload", !model.pinned && !model.minimum && has("ready", "parked"));
  }

  // A button that has the focus keeps it: disabling would throw a keyboard's user back to the top.
  enable(what, possible) {
    this.buttons[what].setAttribute("aria-disabled", String(!possible || this.asking === what));
  }

  // How long a change has been going on, and how far that is of what it took before.
  tick() {
    const changing = this.shown?.findIndex((state) => CHANGING.includes(state)) ?? -1;
    const began = this.table.began.get(this.name);
    this.shown?.forEach((state, index) => {
      const known = index === changing && began !== undefined;
      const since = known ? Math.max(0, this.table.now() - began.time) : 0;
      const before = known && state === "swapping" && began.before ? ` from ${began.before}` : "";
      say(this.badges.get(index).node, `${state}${before}${known ? ` ${seconds(since)}` : ""}`);
    });
    const coming = changing >= 0 && KINDS[this.shown[changing]] === "busy";
    this.progress.hidden = !coming;
    if (!coming) return;
    const expected = this.model.expected_seconds;
    if (expected && began) this.progress.value = Math.min(0.98, (this.table.now() - began.time) / expected);
    else this.progress.removeAttribute("value");
  }

  async ask(what) {
    const button = this.buttons[what];
    if (button.getAttribute("aria-disabled") === "true") return;
    const running = this.engines.reduce((sum, engine) => sum + engine.requests, 0);
    if (what !== "load" && running && !(await confirmed(what, this.name, running))) return;
    this.asking = what;
    this.enable(what, false);
    announce(`${what} ${this.name}`);
    try {
      const path = this.name.split("/").map(encodeURIComponent).join("/");
      await ask(`v1/thaw/models/${path}/${what}`, {});
    } catch (error) {
      this.table.failed(error, `${this.name}: `);
    } finally {
      this.asking = null;
      this.table.asked();
    }
  }
}

// Whether somebody who reads that requests are running still means it.
function confirmed(what, name, running) {
  const dialog = find("#confirm");
  const word = what === "park" ? "Park" : "Unload";
  say(find("h2", dialog), `${word} ${name}?`);
  const theirs = running === 1 ? "It gets" : "They get";
  say(
    find(".why", dialog),
    `It has ${plural(running, "request")}. ${theirs} the time that the server's drain allows to end, and what is left then is cut.`,
  );
  say(find(".primary", dialog), word);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
