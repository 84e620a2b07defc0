// Tokens a second of each model: the differences of what engines have counted, as lines over the last minutes.

import { el, find, keyed, say, svg } from "./dom.js";
import { rate } from "./text.js";

const LONGEST = 300; // seconds
const SHORTEST = 60;
const HEIGHT = 150;
const LEFT = 44;
const BOTTOM = 20;

export class Throughput {
  constructor() {
    this.before = null;
    this.samples = []; // {time, rates: Map of a model to {prompt, generation}}
    const place = find("#throughput .charts");
    this.charts = [
      new Chart(place, "Generated tokens/s", "generation"),
      new Chart(place, "Prompt tokens/s", "prompt"),
    ];
    addEventListener("resize", () => this.draw());
  }

  // Rates since the last answer, by model. An engine that has changed its model, or is new, counts from the next on.
  update(usage, names) {
    const rates = new Map(names.map((name) => [name, { prompt: 0, generation: 0 }]));
    const passed = this.before === null ? 0 : usage.time - this.before.time;
    if (this.before !== null && passed <= 0) return null;
    for (const engine of usage.engines) {
      const last = this.before?.engines.find((one) => one.engine === engine.engine && one.model === engine.model);
      const found = rates.get(engine.model);
      if (last === undefined || found === undefined) continue;
      const grown = (what) => Math.max(0, ((engine[what] ?? 0) - (last[what] ?? 0)) / passed);
      found.prompt += grown("prompt_tokens");
      found.generation += grown("generation_tokens");
    }
    const first = this.before === null;
    this.before = usage;
    if (first) return null;
    this.samples.push({ time: usage.time, rates });
    this.samples = this.samples.filter((sample) => sample.time > usage.time - LONGEST - 5);
    this.names = names;
    this.draw();
    return rates;
  }

  // Another server counts anew.
  anew() {
    this.before = null;
  }

  draw() {
    if (this.samples.length) for (const chart of this.charts) chart.draw(this.samples, this.names);
  }
}

class Chart {
  constructor(place, title, what) {
    this.title = title;
    this.what = what;
    this.picture = svg("svg", { role: "img", height: HEIGHT });
    this.legend = el("ul", { class: "legend" });
    this.entries = new Map();
    this.node = el("figure", {}, el("figcaption", {}, title), this.picture, this.legend);
    place.append(this.node);
  }

  draw(samples, names) {
    const now = samples.at(-1).time;
    const span = Math.min(LONGEST, Math.max(SHORTEST, Math.ceil((now - samples[0].time) / 60) * 60));
    const width = Math.max(200, this.node.clientWidth);
    const value = (sample, name) => sample.rates.get(name)?.[this.what] ?? 0;
    const used = names.filter((name) => samples.some((sample) => value(sample, name) > 0));
    const most = Math.max(1, ...samples.flatMap((sample) => used.map((name) => value(sample, name))));
    const { top, step } = scale(most);
    const x = (time) => LEFT + ((time - now + span) / span) * (width - LEFT - 6);
    const y = (tokens) => 6 + (1 - tokens / top) * (HEIGHT - BOTTOM - 6);
    const parts = [];
    for (let at = 0; at <= top + 1e-9; at += step) {
      const line = { x1: LEFT, x2: width - 6, y1: y(at), y2: y(at), class: "grid" };
      parts.push(svg("line", line), svg("text", { x: LEFT - 6, y: y(at) + 4, class: "end" }, rate(at)));
    }
    for (const [part, place] of [[1, "start"], [0.5, "middle"], [0, "end"]]) {
      const text = part ? `${span * part < 60 ? `${span * part} s` : `${(span * part) / 60} min`} ago` : "now";
      parts.push(svg("text", { x: x(now - span * part), y: HEIGHT - 4, class: place }, text));
    }
    for (const name of used) {
      const points = samples.map((s) => `${x(s.time).toFixed(1)},${y(value(s, name)).toFixed(1)}`);
      parts.push(svg("polyline", { points: points.join(" "), class: `line series-${names.indexOf(name) % 8}` }));
    }
    this.picture.setAttribute("width", width);
    this.picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const last = used.map((name) => `${name} ${rate(value(samples.at(-1), name))}`);
    this.picture.setAttribute("aria-label", `${this.title}, now: ${last.join(", ") || "none"}`);
    this.picture.replaceChildren(...parts);
    keyed(this.legend, this.entries, used, (name) => new Entry(name));
    for (const name of used) this.entries.get(name).update(names.indexOf(name), value(samples.at(-1), name));
  }
}

class Entry {
  constructor(name) {
    this.mark = el("span", {});
    this.value = el("b", {});
    this.node = el("li", {}, this.mark, el("span", { class: "name" }, name), this.value);
  }

  update(index, value) {
    this.mark.className = `mark series-${index % 8}`;
    say(this.value, rate(value));
  }
}

// A round number above, and the step of two to five lines below it.
function scale(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  const step = [0.2, 0.5, 1, 2, 5].map((part) => part * power).find((part) => most / part <= 4) ?? power * 5;
  return { top: Math.ceil(most / step - 1e-9) * step, step };
}
