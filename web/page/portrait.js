// The portrait: one of the server's, or a picture that is checked as soon as it is chosen.

import { about, byId, post, setVideoSize, showMessage, showPictureNotice } from "./elements.js";

const HINTS = {
  free: "Or your own: a face that looks at the camera, as PNG, JPEG, WebP, HEIC or AVIF. It is cropped around the face.",
  used: "The face cannot change during a session. Press Leave to choose another one.",
};
const still = byId("still");
let picture = null; // a file that was chosen and can be used

export function addPortraits() {
  byId("portraits").append(...about.portraits.map((name, i) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "portrait", value: name });
    const image = Object.assign(document.createElement("img"), { src: `/portraits/${name}`, alt: `Person ${i + 1}` });
    input.addEventListener("change", () => choosePortrait(input));
    label.append(input, image);
    return label;
  }));
  choosePortrait(document.querySelector("[name=portrait]"));
  setVideoSize(about);
}

function choosePortrait(input) {
  picture = null;
  input.checked = true;
  byId("picture-name").textContent = "Upload a picture …";
  showPictureNotice("");
  showStill(`/portraits/${input.value}`);
}

// Shows a picture file and asks the server whether it can be used; one that cannot leaves the choice as it was.
export async function choosePicture(file) {
  if (byId("portrait-panel").disabled) {
    showMessage(HINTS.used);
    return;
  }
  if (file.size > about.max_picture_bytes) {
    showMessage(`This picture is too large: at most ${about.max_picture_bytes >> 20} MB are accepted. Choose a smaller one.`);
    return;
  }
  const form = new FormData();
  form.set("picture", file);
  showMessage("Checking the picture …");
  byId("connect").disabled = true;
  try {
    const { picture_notice: notice } = await post("/picture", form);
    picture = file;
    document.querySelectorAll("[name=portrait]").forEach((each) => { each.checked = false; });
    byId("picture-name").textContent = file.name;
    showStill(URL.createObjectURL(file));
    showPictureNotice(notice);
    showMessage("");
  } catch (error) {
    showMessage(error.message);
  }
  byId("connect").disabled = false;
  byId("screen").scrollIntoView({ block: "nearest" });
}

// Adds the chosen portrait to the form that offers a session.
export function addToOffer(form) {
  if (picture) form.set("picture", picture);
  else form.set("portrait", document.querySelector("[name=portrait]:checked").value);
}

export function setPortraitFree(isFree) {
  byId("portrait-panel").disabled = !isFree;
  byId("portrait-hint").textContent = isFree ? HINTS.free : HINTS.used;
}

function showStill(source) {
  if (still.src.startsWith("blob:")) URL.revokeObjectURL(still.src);
  still.src = source;
  still.hidden = false;
}

still.addEventListener("error", () => { still.hidden = true; }); // a format that this browser cannot show, such as HEIC

byId("picture").addEventListener("change", () => {
  const [file] = byId("picture").files;
  byId("picture").value = "";
  if (file) choosePicture(file);
});
