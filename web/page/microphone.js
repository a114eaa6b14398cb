// The microphone and its two uses: to speak through the avatar, and to talk to an avatar that listens.

import { audio, clearMessage, command, session } from "./connection.js";
import { about, byId, showMessage } from "./elements.js";

const USES = ["speak", "talk"];
const REFUSALS = {
  NotAllowedError: "This page may not use the microphone. Allow it in the browser, beside the page’s address, and press the button again.",
  NotFoundError: "No microphone was found. Connect one and press the button again.",
  NotReadableError: "The microphone is in use by another program. Close that and press the button again.",
};
const INSECURE = "Browsers allow the microphone on localhost and over HTTPS only. Open this page there, or choose an audio file.";

byId("microphone-talk").hidden = !about.listens;
for (const use of USES) {
  byId(`microphone-${use}`).addEventListener("click", () => (session.microphone?.use === use ? stopMicrophone() : startMicrophone(use)));
}

async function startMicrophone(use) {
  const own = session;
  stopMicrophone();
  if (!navigator.mediaDevices) {
    showMessage(INSECURE);
    return;
  }
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true, noiseSuppression: true } });
    const [track] = stream.getAudioTracks();
    if (session !== own) {
      track.stop();
      return;
    }
    await own.sender.replaceTrack(track);
    const context = new AudioContext();
    const analyser = context.createAnalyser();
    context.createMediaStreamSource(stream).connect(analyser);
    own.microphone = { use, stop: () => { track.stop(); context.close(); showMicrophone(""); } };
    track.addEventListener("ended", () => own.microphone && stopMicrophone());
    if (use === "speak") audio.name = "Your voice";
    clearMessage();
    showMicrophone(use);
    command("microphone", { use });
    meter(analyser, own);
  } catch (error) {
    showMessage(REFUSALS[error.name] ?? `The microphone does not work (${error.name}). Choose an audio file.`);
  }
}

function stopMicrophone() {
  const { microphone, sender } = session;
  if (!microphone) return;
  session.microphone = null;
  command("microphone", { use: "off" });
  microphone.stop();
  sender.replaceTrack(null);
}

// Ends speech from the microphone. What the avatar listens to goes on while it speaks.
export function stopSpeaking() {
  if (session.microphone?.use === "speak") stopMicrophone();
}

function showMicrophone(inUse) {
  for (const use of USES) byId(`microphone-${use}`).setAttribute("aria-pressed", String(use === inUse));
  byId("level").value = 0;
  byId("level").hidden = !inUse;
}

function meter(analyser, own) {
  const samples = new Float32Array(analyser.fftSize);
  const check = () => {
    if (!own.microphone || session !== own) return;
    analyser.getFloatTimeDomainData(samples);
    byId("level").value = Math.min(1, 4 * Math.sqrt(samples.reduce((sum, each) => sum + each * each, 0) / samples.length));
    requestAnimationFrame(check);
  };
  check();
}
