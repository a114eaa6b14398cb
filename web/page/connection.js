// The session: offered by WebRTC, with a data channel for messages; web/browser_session.py lists these.

import { byId, logEvent, post, setVideoSize, showMessage, showPictureNotice } from "./elements.js";
import { addToOffer, setPortraitFree } from "./portrait.js";
import { addTurn, beginTurn, endTurn, interruptTurns, skipTurn } from "./transcript.js";

export const MAX_BUFFERED_BYTES = 48000; // a second of audio; an interrupt waits behind it

const STATES = {
  off: "Not connected", connecting: "Connecting …", idle: "Ready", preparing: "Preparing …", speaking: "Speaking",
};
const video = byId("video");
let machineNotice = ""; // that the machine is slow: shown as long as there is no other message

export const clearMessage = () => showMessage(machineNotice);

// {peer, channel, sender, microphone, isReady}, while connected. isReady: a promise, false if the session fails.
export let session = null;
export const audio = { name: "" }; // of the audio that is being sent, for the transcript

export async function connect() {
  showMessage(machineNotice = "");
  const peer = new RTCPeerConnection();
  const channel = peer.createDataChannel("avatar");
  channel.binaryType = "arraybuffer";
  channel.bufferedAmountLowThreshold = MAX_BUFFERED_BYTES / 3;
  const sender = peer.addTransceiver("audio", { direction: "sendrecv" }).sender;
  peer.addTransceiver("video", { direction: "recvonly" });
  let settle;
  const own = session = { peer, channel, sender, microphone: null, isReady: new Promise((done) => { settle = done; }) };
  setState("connecting");
  peer.addEventListener("track", ({ streams, track }) => play(streams[0] ?? new MediaStream([track])));
  peer.addEventListener("connectionstatechange", () => {
    if (peer.connectionState === "failed" && session === own) disconnect("The connection was lost. Press Start to connect again.");
  });
  channel.addEventListener("open", () => { setSpeechAllowed(true); settle(true); logEvent("Connected"); });
  channel.addEventListener("message", ({ data }) => session === own && handle(JSON.parse(data)));
  channel.addEventListener("close", () => {
    settle(false);
    if (session === own) disconnect("The session has ended. Press Start for another one.");
  });
  try {
    await peer.setLocalDescription(await peer.createOffer());
    await iceGathered(peer);
    const form = new FormData();
    form.set("sdp", peer.localDescription.sdp);
    addToOffer(form);
    const answer = await post("/offer", form);
    if (session !== own) return;
    setVideoSize(answer);
    await peer.setRemoteDescription({ type: "answer", sdp: answer.sdp });
    showPictureNotice(answer.picture_notice);
    showMessage(machineNotice = answer.notice);
    byId("expected").textContent = answer.reaction_s ? `${answer.reaction_s.toFixed(2)} s` : "unknown";
  } catch (error) {
    settle(false);
    if (session === own) disconnect(error.message);
  }
}

function iceGathered(peer) {
  return new Promise((done) => {
    const check = () => peer.iceGatheringState === "complete" && done();
    peer.addEventListener("icegatheringstatechange", check);
    setTimeout(done, 2000); // continue with the candidates gathered by then
    check();
  });
}

async function play(stream) {
  video.srcObject = stream;
  try {
    await video.play();
  } catch (error) {
    if (error.name !== "NotAllowedError") return; // the session has ended meanwhile
    showMessage("The browser plays nothing before you touch the page. Click anywhere.");
    addEventListener("click", () => { video.play(); clearMessage(); }, { once: true });
  }
}

export function disconnect(reason = "") {
  const { peer, microphone } = session;
  session = null;
  microphone?.stop();
  peer.close();
  video.srcObject = null;
  interruptTurns("");
  setSpeechAllowed(false);
  for (const id of ["reaction", "expected", "rate", "network"]) byId(id).textContent = "–";
  setState("off");
  logEvent(reason || "Disconnected");
  showMessage(reason);
}

export const command = (type, fields = {}) => session?.channel.send(JSON.stringify({ type, ...fields }));

// Handles a message from the server.
function handle(item) {
  switch (item.type) {
    case "state":
      setState(item.state);
      logEvent(STATES[item.state]);
      break;
    case "turn":
      addTurn(item.text ?? audio.name);
      break;
    case "reaction":
      beginTurn();
      byId("reaction").textContent = `${item.seconds.toFixed(2)} s`;
      logEvent(`Reaction after ${item.seconds.toFixed(2)} s`);
      break;
    case "finished":
      endTurn();
      break;
    case "unspoken":
      skipTurn();
      break;
    case "interrupted":
      interruptTurns(item.spoken);
      logEvent(item.was_speaking ? `Interrupted after ${item.position_s.toFixed(1)} s` : "Nobody was speaking");
      break;
    case "notice":
      showMessage(item.text);
      logEvent(item.text);
      break;
    case "ended":
      disconnect(item.text);
      break;
  }
}

function setState(state) {
  for (const each of document.querySelectorAll("[data-state]")) each.dataset.state = state;
  byId("state").textContent = STATES[state];
  const isOn = state !== "off";
  byId("screen").toggleAttribute("data-live", isOn && state !== "connecting");
  byId("connect").textContent = isOn ? "Leave" : "Start";
  byId("connect").classList.toggle("primary", !isOn);
  byId("interrupt").disabled = !isOn || state === "connecting";
  setPortraitFree(!isOn);
}

function setSpeechAllowed(isAllowed) {
  for (const each of document.querySelectorAll(".speech")) each.disabled = !isAllowed;
}

byId("connect").addEventListener("click", () => (session ? disconnect() : connect()));
addEventListener("pagehide", () => session?.peer.close());
setState("off");
