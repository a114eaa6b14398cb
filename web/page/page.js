// The page: starts its parts, and measures what the browser shows.

import { session } from "./connection.js";
import { byId } from "./elements.js";
import { addPortraits } from "./portrait.js";
import "./speech.js";

const METRICS_MS = 1000;
const video = byId("video");

let shown = 0;
if ("requestVideoFrameCallback" in video) {
  const count = () => { shown += 1; video.requestVideoFrameCallback(count); };
  video.requestVideoFrameCallback(count);
}

let counted = { shown: 0, at: performance.now() };
setInterval(async () => {
  const now = performance.now();
  const rate = (1000 * (shown - counted.shown)) / (now - counted.at);
  counted = { shown, at: now };
  if (!session || session.peer.connectionState !== "connected") return;
  byId("rate").textContent = `${rate.toFixed(0)} / s`;
  const stats = [...(await session.peer.getStats()).values()];
  const pair = stats.find((each) => each.type === "candidate-pair" && each.nominated);
  if (pair?.currentRoundTripTime !== undefined) {
    byId("network").textContent = `${(pair.currentRoundTripTime * 1000).toFixed(0)} ms`;
  }
}, METRICS_MS);

byId("volume").addEventListener("input", () => { video.volume = byId("volume").value / 100; });
addPortraits();
