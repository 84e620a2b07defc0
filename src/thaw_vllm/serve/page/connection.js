// Whether the server is there and we are logged in; and its events, as they come.

import { ask, LostError, RefusedError } from "./api.js";

const FIRST = 500; // milliseconds until the first new try
const LONGEST = 10000;

export class Connection {
  // `heard` is called with each event, `changed` with "live", "lost", "out" or "connecting", `anew` where another
  // server has taken the place of the one we knew.
  constructor({ heard, changed, anew }) {
    this.heard = heard;
    this.changed = changed;
    this.anew = anew;
    this.state = "connecting";
    this.tries = 0;
    this.last = 0;
    this.server = null;
    this.stream = null;
    this.timer = null;
    this.expiry = null;
    addEventListener("online", () => this.hurry());
    document.addEventListener("visibilitychange", () => document.hidden || this.hurry());
  }

  async connect() {
    this.close();
    let session;
    try {
      session = await ask("thaw/session");
    } catch {
      this.lost();
      return;
    }
    if (this.server !== null && this.server !== session.server) {
      this.last = 0;
      this.anew();
    }
    this.server = session.server;
    if (!session.in) {
      this.set("out");
      return;
    }
    this.expiry = setTimeout(() => this.connect(), session.seconds * 1000 + 500);
    const stream = new EventSource(`v1/thaw/events?after=${this.last}`);
    this.stream = stream;
    stream.onopen = () => {
      this.tries = 0;
      this.set("live");
    };
    stream.onmessage = (message) => {
      const event = JSON.parse(message.data);
      this.last = event.number;
      this.heard(event);
    };
    stream.onerror = () => {
      if (stream === this.stream) this.lost();
    };
  }

  // A request has failed: find out whether it is the connection, or the session.
  failed(error) {
    if (this.state !== "live") return;
    if (error instanceof LostError) this.lost();
    else if (error instanceof RefusedError && error.status === 403) this.connect();
  }

  lost() {
    this.close();
    this.set("lost");
    const wait = Math.min(LONGEST, FIRST * 2 ** this.tries) * (0.75 + Math.random() / 2);
    this.tries += 1;
    this.timer = setTimeout(() => this.connect(), wait);
  }

  hurry() {
    if (this.state === "lost") this.connect();
  }

  close() {
    clearTimeout(this.timer);
    clearTimeout(this.expiry);
    if (this.stream !== null) this.stream.close();
    this.stream = null;
  }

  set(state) {
    if (state === this.state) return;
    this.state = state;
    this.changed(state);
  }
}
