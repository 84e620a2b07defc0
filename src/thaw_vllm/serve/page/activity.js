// What happens, newest first, in words.

import { announce, el, find, say } from "./dom.js";
import { clock, seconds } from "./text.js";

const SHOWN = 100;

const WORDS = {
  registered: (e) => ["", `${e.model} is served from now on`],
  starting: (e) => ["busy", `${e.model} is starting`],
  started: (e) => ["ready", `${e.model} is ready, started in ${seconds(e.seconds)}`],
  swapping: (e) => ["busy", `${e.model} is taking the place of ${e.before}`],
  swapped: (e) => ["ready", `${e.model} is ready, swapped in ${seconds(e.seconds)}`],
  parking: (e) => ["going", `${e.model} is parking`],
  parked: (e) => ["parked", `${e.model} is parked, in ${seconds(e.seconds)}`],
  waking: (e) => ["busy", `${e.model} is waking`],
  woken: (e) => ["ready", `${e.model} is awake, in ${seconds(e.seconds)}`],
  stopping: (e) => ["going", `${e.model} is stopping`],
  stopped: (e) => ["", `${e.model} is stopped, in ${seconds(e.seconds)}`],
  failed: (e) => ["failed", `${e.model} did not start; left alone for ${seconds(e.again_in)}`],
  lost: (e) => ["failed", `${e.model}: its engine is lost`],
  "swap refused": (e) => ["going", `${e.model}: its engine would not be swapped`],
  "parking refused": (e) => ["going", `${e.model} would not be parked`],
  verifying: (e) => ["busy", `${subject(e)} is being verified`],
  verified: (e) => ["ready", `${subject(e)} is sound, verified in ${seconds(e.seconds)}`],
  "verification failed": (e) => ["failed", `${subject(e)} is not sound`],
  "verification cancelled": (e) => ["", `${subject(e)}: verification was cancelled`],
};

function subject(event) {
  return event.path ?? event.kv ?? `the snapshot of ${event.model}`;
}

export class Activity {
  constructor() {
    this.list = find("#activity ol");
    this.list.append(el("li", { class: "empty" }, "Nothing has happened yet."));
  }

  // `fresh`: it happens now, and is not remembered only.
  add(event, fresh) {
    const [kind, text] = (WORDS[event.event] ?? ((e) => ["", `${e.event} ${e.model ?? ""}`]))(event);
    this.put(event.time, kind, text, event.why);
    if (fresh) announce(text);
  }

  anew() {
    this.put(Date.now() / 1000, "going", "The server has been started anew.");
  }

  put(time, kind, text, why) {
    find(".empty", this.list)?.remove();
    this.list.prepend(
      el(
        "li",
        { "data-kind": kind },
        el("time", { datetime: new Date(time * 1000).toISOString() }, clock(time)),
        el("span", {}, text),
        why ? el("span", { class: "why" }, why) : null,
      ),
    );
    while (this.list.children.length > SHOWN) this.list.lastChild.remove();
  }
}
