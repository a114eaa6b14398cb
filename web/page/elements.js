// The page's elements, the settings of its server, and the two places for messages.

export const byId = (id) => document.getElementById(id);
export const about = await (await fetch("/about")).json();

const MAX_EVENTS = 50;

export function showMessage(text) {
  byId("message").textContent = text;
}

// Shows what is wrong with the picture, for as long as the picture is chosen.
export function showPictureNotice(text) {
  byId("picture-notice").textContent = text;
  byId("picture-notice").hidden = !text;
}

// Gives the screen the video's shape and size: two pixels of the page for one of the video's, where there is space.
export function setVideoSize({ width, height }) {
  byId("screen").style.setProperty("--video-width", width);
  byId("screen").style.setProperty("--video-height", height);
}

export function logEvent(text) {
  const item = document.createElement("li");
  const time = document.createElement("time");
  time.textContent = new Date().toLocaleTimeString([], { hour12: false });
  item.append(time, text);
  byId("events").prepend(item);
  while (byId("events").children.length > MAX_EVENTS) byId("events").lastChild.remove();
}

// Sends a form to the server and returns its answer. Throws an Error in words for a person.
export async function post(path, form) {
  let response;
  try {
    response = await fetch(path, { method: "POST", body: form });
  } catch {
    throw new Error("The server cannot be reached. Try again in 10 seconds.");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? "The server has failed. Try again in 10 seconds.");
  return answer;
}
