// The router's frames, for as long as the page is open: read with fetch, which can send a key, and begun anew when lost.

const LATE_MS = 5000;
const RETRY_MS = [500, 1000, 2000, 5000];

/** One event's data, of its lines. */
function readEvent(text) {
  const event = { kind: "message", data: "" };
  for (const line of text.split("\n")) {
    if (line.startsWith("event: ")) event.kind = line.slice(7);
    if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  return event;
}

/** Calls `onFrame(frame)` and `onState(state, words)`; state is live, late, lost or key. */
class Stream {
  constructor({ onFrame, onState }) {
    this.onFrame = onFrame;
    this.onState = onState;
    this.failures = 0;
    this.heardMs = Date.now();
    setInterval(() => this.watch(), 1000);
  }

  async run() {
    for (;;) {
      const retryMs = await this.read().catch(() => this.lost("the router does not answer"));
      if (retryMs === null) return;
      await new Promise((done) => setTimeout(done, retryMs));
    }
  }

  watch() {
    if (this.live && Date.now() - this.heardMs > LATE_MS) {
      this.onState("late", `nothing heard for ${Math.round((Date.now() - this.heardMs) / 1000)} s`);
    }
  }

  lost(words) {
    this.live = false;
    const retryMs = RETRY_MS[Math.min(this.failures, RETRY_MS.length - 1)];
    this.failures += 1;
    this.onState("lost", `${words}; trying again`);
    return retryMs;
  }

  /** Reads one stream to its end. Returns the time to wait before the next, null when a key is needed first. */
  async read() {
    const key = sessionStorage.getItem("starmesh-key");
    const headers = key ? { authorization: `Bearer ${key}` } : {};
    const response = await fetch("live/events", { headers, cache: "no-store" });
    if (response.status === 401 || response.status === 403) {
      sessionStorage.removeItem("starmesh-key");
      const told = await response.json().catch(() => ({}));
      this.onState("key", key ? told.error?.message ?? "the key was refused" : "");
      return null;
    }
    if (!response.ok) {
      const told = await response.json().catch(() => ({}));
      return this.lost(told.error?.message ?? `the router answered ${response.status}`);
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return this.lost("the stream ended");
      text += value;
      const events = text.split("\n\n");
      text = events.pop();
      const newest = events.pop();
      if (newest === undefined) continue;
      const event = readEvent(newest);
      if (event.kind === "end") return this.lost("the router is stopping");
      this.live = true;
      this.failures = 0;
      this.heardMs = Date.now();
      this.onState("live", "live");
      this.onFrame(JSON.parse(event.data));
    }
  }
}
