// Where the last starts of engines spent their time, a waterfall each.

import { el, find, keyed, say } from "./dom.js";
import { clock, plural, seconds } from "./text.js";

const SHORT = 0.01; // of the whole: phases that are shorter are summed up
const SHOWN = 8;
const GROUPS = [
  [/^(first token)$/, "token"],
  [/^(engine|helper)/, "core"],
  [/^(worker|device|model|weights|post-processing|profile|compile|KV cache|warm-up|kernel warm-up|graphs)/, "worker"],
  [/^other$/, "other"],
];

export class Starts {
  constructor() {
    this.list = find("#starts .list");
    this.kept = new Map();
    this.empty = el("p", { class: "empty" }, "No engine has been started yet.");
    this.list.append(this.empty);
  }

  update({ starts }) {
    const shown = starts.slice(0, SHOWN);
    this.empty.hidden = shown.length > 0;
    const keys = shown.map((start) => `${start.engine} ${start.time}`);
    keyed(this.list, this.kept, keys, () => new Start(this.kept.size === 0));
    shown.forEach((start, index) => this.kept.get(keys[index]).update(start));
    this.list.append(this.empty);
  }
}

class Start {
  constructor(open) {
    this.summary = el("summary", {});
    this.body = el("div", { class: "waterfall" });
    this.node = el("details", { open }, this.summary, this.body);
    this.shown = "";
  }

  update(start) {
    const document = JSON.stringify(start);
    if (document === this.shown) return;
    this.shown = document;
    const whole = start.first_token ? `${seconds(start.total)} to the first token` : `ready in ${seconds(start.ready_seconds)}`;
    this.summary.replaceChildren(
      el("span", { class: "name" }, start.model),
      el("b", {}, whole),
      el("span", { class: "hint" }, `${clock(start.time)} · pid ${start.engine}`),
    );
    if (!start.phases) {
      this.body.replaceChildren(el("p", { class: "empty" }, "There is no report of this start."));
      return;
    }
    const long = start.phases.filter((phase) => phase.seconds >= SHORT * start.total);
    const rest = start.phases.filter((phase) => !long.includes(phase));
    const rows = long.map((phase) => row(phase, start.total));
    const notes = [];
    if (rest.length) {
      const sum = rest.reduce((all, phase) => all + phase.seconds, 0);
      notes.push(`${plural(rest.length, "shorter phase")}, ${seconds(sum)}: ${rest.map((phase) => phase.phase).join(", ")}.`);
    }
    if (start.waited > 1) notes.push(`It waited ${seconds(start.waited)} for its first request, which is left out.`);
    if (!start.first_token) notes.push("No token has come yet.");
    this.body.replaceChildren(el("ol", {}, ...rows), el("p", { class: "hint" }, notes.join(" ")));
  }
}

function row(phase, total) {
  const parted = phase.end - phase.begin > 1.2 * phase.seconds + 0.005; // others came in between
  const group = GROUPS.find(([names]) => names.test(phase.phase))?.[1] ?? "front";
  const bar = el("span", { class: `bar ${group}${parted ? " parted" : ""}` });
  bar.style.setProperty("margin-left", `${(100 * phase.begin) / total}%`);
  bar.style.setProperty("width", `${Math.max(0.4, (100 * (phase.end - phase.begin)) / total)}%`);
  const said = `${phase.phase}: ${seconds(phase.seconds)} of its own, between ${seconds(phase.begin)} and ${seconds(phase.end)}`;
  return el(
    "li",
    { title: said },
    el("span", { class: "phase" }, phase.phase),
    el("span", { class: "track" }, bar),
    el("span", { class: "number" }, seconds(phase.seconds)),
  );
}
