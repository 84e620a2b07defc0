// The form that asks for the admin token: a page of its own, and a dialog of the page's where a session has ended.

import { ask } from "./api.js";
import { find, say } from "./dom.js";

const TRIED = "thaw-page-reloaded";

// Calls `done` once the server has taken the token, which is forgotten here at once.
export function wire(form, done) {
  const field = find("input", form);
  const button = find("button", form);
  const error = find(".error", form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    say(error, "");
    try {
      await ask("thaw/login", { token: field.value.trim() });
      field.value = "";
      done();
    } catch (refused) {
      say(error, `${refused.message}.`);
      field.select();
      field.focus();
    } finally {
      button.disabled = false;
    }
  });
}

async function start() {
  wire(find("#login"), () => location.reload());
  // Whoever comes by a link of another site brings no cookie at first.
  try {
    if ((await ask("thaw/session")).in && sessionStorage.getItem(TRIED) === null) {
      sessionStorage.setItem(TRIED, "1");
      location.reload();
    }
  } catch {
    // the form says what is wrong once it is sent
  }
}

if (document.body.classList.contains("login")) start();
else sessionStorage.removeItem(TRIED);
