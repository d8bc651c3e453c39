// Numbers, times and words for people, and elements made of text only.

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Sets text only where it differs: what has not changed keeps its selection. */
function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

function compact(count) {
  if (count < 1000) return String(Math.round(count));
  if (count < 1e6) return `${(count / 1e3).toFixed(count < 1e4 ? 2 : 1)}k`;
  return `${(count / 1e6).toFixed(count < 1e7 ? 2 : 1)}M`;
}

function whole(count) {
  return Math.round(count).toLocaleString("en");
}

function plural(count, noun) {
  return `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
}

function percent(part) {
  return `${Math.round(part * 100)} %`;
}

/** A protobuf Duration, "1.5s", as seconds; 0 for none. */
function seconds(duration) {
  return duration ? parseFloat(duration) : 0;
}

function span(secs) {
  if (secs < 0.0995) return `${(secs * 1e3).toFixed(secs < 0.00995 ? 1 : 0)} ms`;
  if (secs < 1) return `${Math.round(secs * 1e3)} ms`;
  if (secs < 100) return `${secs.toFixed(secs < 10 ? 2 : 1)} s`;
  return `${Math.round(secs / 60)} min`;
}

function clock(epochMs) {
  return new Date(epochMs).toLocaleTimeString("en-GB");
}

/** "MIGRATION_REASON_PREDICTED_LOAD" without its prefix, or "no_gain", as words. */
function words(code, prefix = "") {
  return (code ?? "").replace(prefix, "").toLowerCase().replaceAll("_", " ");
}

/** "3 no gain, 1 settling" of a map from reason to count, the most frequent first. */
function counted(reasons) {
  return Object.entries(reasons ?? {})
    .sort(([, one], [, other]) => other - one)
    .map(([reason, count]) => `${count} ${words(reason)}`)
    .join(", ");
}

/** A hue for an id, always the same, so that the eye finds a sequence again where it has moved; away from the colours of warnings. */
function hueOf(id) {
  let hash = 2166136261;
  for (const char of id) hash = Math.imul(hash ^ char.codePointAt(0), 16777619);
  hash = Math.imul(hash ^ (hash >>> 15), 2246822507);
  return 140 + ((hash >>> 8) % 165);
}

const still = window.matchMedia("(prefers-reduced-motion: reduce)");
