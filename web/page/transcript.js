// The transcript: what the avatar says, turn by turn, and what an interrupt left unsaid.

import { byId } from "./elements.js";

let waiting = []; // turns that are not spoken yet, in order
let speaking = null;

// Adds a turn. text: its words; or a name of its audio, in words.
export function addTurn(text) {
  const item = document.createElement("li");
  item.append(Object.assign(document.createElement("span"), { textContent: text }));
  waiting.push(item);
  mark(item, "waiting");
  byId("transcript-hint").hidden = true;
  byId("turns").append(item);
  byId("transcript").scrollTop = byId("transcript").scrollHeight;
}

export function beginTurn() {
  endTurn();
  speaking = waiting.shift() ?? null;
  if (speaking) mark(speaking, "speaking");
}

export function endTurn() {
  if (speaking) mark(speaking, "");
  speaking = null;
}

export function skipTurn() {
  const item = waiting.shift();
  if (item) mark(item, "not spoken");
}

// Strikes out what was not spoken. spoken: the words that were, of a turn of text.
export function interruptTurns(spoken) {
  if (speaking) {
    const words = speaking.firstChild;
    if (spoken && words.textContent.startsWith(spoken)) {
      words.after(Object.assign(document.createElement("del"), { textContent: words.textContent.slice(spoken.length) }));
      words.textContent = spoken;
    }
    mark(speaking, "interrupted");
  }
  speaking = null;
  while (waiting.length) skipTurn();
}

function mark(item, text) {
  item.querySelector("small")?.remove();
  if (text) item.append(Object.assign(document.createElement("small"), { textContent: text }));
  item.dataset.mark = text;
}
