// What of the prompts engines found in their caches.

import { el, find, keyed, say } from "./dom.js";
import { count, percent } from "./text.js";

export class Caches {
  constructor() {
    this.list = find("#caches .list");
    this.kept = new Map();
    this.empty = el("p", { class: "empty" }, "No engine is ready.");
    this.list.append(this.empty);
  }

  update({ engines }) {
    const shown = engines.filter((engine) => engine.prefix_queries !== undefined);
    say(this.empty, engines.length ? "The engines say nothing of a prefix cache." : "No engine is ready.");
    this.empty.hidden = shown.length > 0;
    keyed(this.list, this.kept, shown.map((engine) => String(engine.engine)), () => new Cache());
    for (const engine of shown) this.kept.get(String(engine.engine)).update(engine);
    this.list.append(this.empty);
  }
}

class Cache {
  constructor() {
    this.name = el("span", { class: "name" });
    this.rate = el("b", {});
    this.bar = el("span", { class: "bar ready" });
    this.hits = el("span", {});
    this.node = el(
      "div",
      { class: "cache" },
      el("p", {}, this.name, this.rate),
      el("span", { class: "track" }, this.bar),
      el("p", { class: "hint" }, this.hits),
    );
  }

  update(engine) {
    const queries = engine.prefix_queries;
    const rate = queries ? engine.prefix_hits / queries : 0;
    say(this.name, engine.model);
    say(this.rate, queries ? `${percent(rate)} hits` : "not asked yet");
    this.bar.style.setProperty("width", `${rate * 100}%`);
    const used = engine.kv_cache_usage === undefined ? "" : ` · ${percent(engine.kv_cache_usage)} of the cache in use`;
    say(this.hits, `${count(engine.prefix_hits ?? 0)} of ${count(queries)} prompt tokens${used}`);
  }
}
