// The page: asks the server how it is, and shows it.

import { Activity } from "./activity.js";
import { ask, RefusedError } from "./api.js";
import { Caches } from "./caches.js";
import { Connection } from "./connection.js";
import { announce, find, say } from "./dom.js";
import { wire } from "./login.js";
import { Models } from "./models.js";
import { Sessions } from "./sessions.js";
import { Snapshots } from "./snapshots.js";
import { Starts } from "./starts.js";
import { plural } from "./text.js";
import { Throughput } from "./throughput.js";

const EVERY = 2000; // milliseconds
const FRESH = 5; // seconds: events that are older are remembered ones

const work = { asked: () => refresh(), failed };
const models = new Models(work);
const snapshots = new Snapshots(work);
const sessions = new Sessions(work);
const activity = new Activity();
const throughput = new Throughput();
const starts = new Starts();
const caches = new Caches();
let names = [];
let soon = null;

const connection = new Connection({
  heard(event) {
    const fresh = models.now() - event.time < FRESH;
    activity.add(event, fresh && connection.state === "live");
    models.heard(event);
    soon ??= setTimeout(() => refresh(event), 50);
    if (/^(started|registered)$/.test(event.event)) later();
    if (/^verif/.test(event.event)) verification();
  },
  changed(state) {
    const words = { live: "live", lost: "no connection", out: "logged out", connecting: "connecting" };
    const shown = find("#connection");
    say(shown, words[state]);
    shown.dataset.state = state;
    document.body.classList.toggle("stale", state !== "live");
    notice(state === "lost" ? "Connection lost, trying again." : "");
    if (state === "out") askLogin();
    if (state === "live") {
      refresh();
      later();
      verification();
    }
  },
  anew() {
    activity.anew();
    models.anew();
    throughput.anew();
    say(find("#ask-login .why"), "The server has been started anew, and asks who you are.");
  },
});

function notice(text) {
  const node = find("#notice");
  say(node, text);
  node.hidden = text === "";
}

function failed(error, what = "") {
  connection.failed(error);
  if (error instanceof RefusedError) {
    notice(`${what}${error.message}`);
    announce(error.message);
  }
}

// `refused` is called where the server says what is wrong.
async function shown(path, show, refused = failed) {
  if (connection.state !== "live") return;
  try {
    show(await ask(path));
  } catch (error) {
    (error instanceof RefusedError && error.status !== 403 ? refused : failed)(error);
  }
}

async function refresh() {
  clearTimeout(soon);
  soon = null;
  await shown("v1/thaw/status", (status) => {
    names = Object.keys(status.models);
    models.update(status);
    const ready = new Set(status.engines.filter((e) => e.state === "ready").map((e) => e.model)).size;
    const waiting = status.waiting ? `, ${plural(status.waiting, "request")} waiting` : "";
    say(find("#summary"), `${ready} of ${plural(names.length, "model")} ready, ${plural(status.engines.length, "engine")}${waiting}`);
    document.title = `${ready}/${names.length} ready · thaw`;
  });
}

async function measure() {
  await shown("v1/thaw/usage", (usage) => {
    caches.update(usage);
    const rates = throughput.update(usage, names);
    if (rates !== null) models.rates(rates);
  });
}

// What changes seldom.
async function later() {
  await Promise.all([
    shown("v1/thaw/starts", (found) => starts.update(found)),
    shown("v1/thaw/snapshots", (found) => snapshots.update(found)),
    shown("v1/thaw/kv", (found) => snapshots.updateKV(found)),
    kept(),
  ]);
}

async function kept() {
  const told = (found) => sessions.update(found);
  await shown("v1/thaw/sessions", told, (error) => sessions.refused(error));
}

async function verification() {
  await shown("v1/thaw/verify", (state) => snapshots.verification(state));
}

let asking = false;
let turn = 0;

async function tick() {
  if (asking || document.hidden || connection.state !== "live") return;
  asking = true;
  turn += 1;
  try {
    await refresh();
    await measure();
    if (snapshots.running) await verification();
    if (turn % 10 === 0) await shown("v1/thaw/starts", (found) => starts.update(found)); // a first token may have come
    if (turn % 30 === 0) await later();
    else if (turn % 5 === 0 && sessions.there) await kept();
  } finally {
    asking = false;
  }
}

function askLogin() {
  const dialog = find("#ask-login");
  if (!dialog.open) dialog.showModal();
  find("input", dialog).focus();
}

find("#ask-login").addEventListener("cancel", (event) => event.preventDefault());
wire(find("#login"), () => {
  find("#ask-login").close();
  connection.connect();
});
find("#logout").addEventListener("click", async () => {
  try {
    await ask("thaw/logout", {});
    location.reload();
  } catch (error) {
    failed(error);
  }
});
document.addEventListener("visibilitychange", tick);
setInterval(tick, EVERY);
connection.connect();
