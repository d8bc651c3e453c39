// The decode instances, each with a bar of its KV and its sequences as blocks. Few have a lane each; many are tiles, and
// only the bar and the blocks of a tile are the same. A block is one element for as long as its sequence lives: when it
// has moved it is seen to go over.

const MOVED_MS = 4000;
const LEAST_BLOCK_PART = 0.002;

class Kv {
  constructor(parent) {
    this.bar = parent.appendChild(element("div", "kv"));
    this.bar.setAttribute("role", "img");
    this.used = this.bar.appendChild(element("i", "used"));
    this.reserved = this.bar.appendChild(element("i", "reserved"));
    this.peak = this.bar.appendChild(element("i", "peak"));
  }

  show(one) {
    const used = Math.min(1, one.used);
    this.used.style.width = `${used * 100}%`;
    this.reserved.style.left = `${used * 100}%`;
    this.reserved.style.width = `${Math.min(1 - used, one.reservedPart) * 100}%`;
    this.peak.hidden = !one.peak;
    this.peak.style.left = `${Math.min(0.995, one.peakPart) * 100}%`;
    this.peak.classList.toggle("over", one.peakPart > 1);
    const expected = one.peak ? `, ${percent(one.peakPart)} expected at most` : "";
    const reserved = one.reservedPart ? `, ${percent(one.reservedPart)} reserved` : "";
    this.bar.setAttribute("aria-label", `KV ${percent(one.used)} in use${reserved}${expected}`);
  }
}

function describe(sequence, where) {
  const expected =
    sequence.remaining === undefined
      ? "no estimate of what remains"
      : `${whole(sequence.remaining)} expected still, ${whole(sequence.upper ?? sequence.remaining)} at most ` +
        `(estimated ${plural(sequence.age, "token")} ago)`;
  return (
    `${sequence.id} at ${where}: prompt ${whole(sequence.prompt)}, output ${whole(sequence.output)} of at most ` +
    `${whole(sequence.limit)}, ${expected}; ${whole(sequence.resident)} resident, epoch ${sequence.epoch}`
  );
}

/** All blocks of the page. */
class Blocks {
  constructor(detail) {
    this.detail = detail;
    this.known = new Map();
    this.count = 0;
  }

  make(id) {
    const block = element("div", "block");
    block.setAttribute("role", "listitem");
    block.tabIndex = -1;
    block.style.setProperty("--hue", hueOf(id));
    block.dataset.request = id;
    const entry = { block, id, since: 0, movedMs: 0, lane: null, text: "" };
    const tell = () => say(this.detail, entry.text);
    block.addEventListener("pointerenter", tell);
    block.addEventListener("focus", tell);
    block.addEventListener("keydown", (event) => this.step(event, block));
    this.known.set(id, entry);
    return entry;
  }

  /** Arrow keys go from block to block. */
  step(event, block) {
    const way = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (!way) return;
    let next = block[way];
    while (next && !next.classList.contains("block")) next = next[way];
    if (next) next.focus();
    event.preventDefault();
  }

  /** Shows `one`'s sequences in `lane`, whose whole width stands for `scale` tokens. */
  show(lane, one, scale, nowMs) {
    const entries = one.sequences.map((sequence) => ({ sequence, entry: this.known.get(sequence.id) ?? this.make(sequence.id) }));
    for (const { entry } of entries) {
      if (entry.lane === lane) continue;
      if (entry.lane) entry.movedMs = nowMs;
      entry.from = entry.lane ? entry.block.getBoundingClientRect() : null;
      entry.lane = lane;
      entry.since = this.count++;
    }
    entries.sort((a, b) => a.entry.since - b.entry.since);
    let left = 0;
    for (const { sequence, entry } of entries) {
      const { block } = entry;
      const all = sequence.resident + (sequence.remaining ?? 0);
      const part = Math.max(LEAST_BLOCK_PART, all / scale);
      if (block.parentNode !== lane) lane.append(block);
      block.style.left = `${left * 100}%`;
      block.style.width = `calc(${part * 100}% - 1px)`;
      block.style.setProperty("--part", `${all ? (100 * sequence.resident) / all : 100}%`);
      block.classList.toggle("moved", nowMs - entry.movedMs < MOVED_MS);
      entry.text = describe(sequence, one.id);
      entry.seenMs = nowMs;
      block.setAttribute("aria-label", entry.text);
      if (document.activeElement === block) say(this.detail, entry.text);
      left += part;
    }
    const first = entries[0]?.entry.block;
    for (const { entry } of entries) {
      const tab = entry.block === (lane.contains(document.activeElement) ? document.activeElement : first) ? 0 : -1;
      if (entry.block.tabIndex !== tab) entry.block.tabIndex = tab;
    }
    this.showRest(lane, one, left, scale);
  }

  /** What the frame does not list, as one. */
  showRest(lane, one, left, scale) {
    const hidden = one.running + one.waiting - one.sequences.length;
    const listed = one.sequences.reduce((sum, sequence) => sum + sequence.resident, 0);
    let rest = lane.querySelector(".rest");
    if (hidden <= 0 || one.resident <= listed) {
      rest?.remove();
      return;
    }
    rest ??= lane.appendChild(element("div", "block rest"));
    rest.style.left = `${left * 100}%`;
    rest.style.width = `calc(${((one.resident - listed) / scale) * 100}% - 1px)`;
    rest.setAttribute("aria-label", `${plural(hidden, "smaller sequence")}`);
    rest.title = rest.getAttribute("aria-label");
  }

  /** Has those that have changed lanes go over, and removes those that have ended. */
  settle(nowMs) {
    for (const [id, entry] of this.known) {
      if (entry.seenMs !== nowMs) {
        entry.block.remove();
        this.known.delete(id);
      } else if (entry.from) {
        this.fly(entry.block, entry.from);
        entry.from = null;
      }
    }
  }

  fly(block, from) {
    if (still.matches || !from.width) return;
    const to = block.getBoundingClientRect();
    const start = { transform: `translate(${from.left - to.left}px, ${from.top - to.top}px)` };
    block.classList.add("flying");
    const flight = block.animate([start, { transform: "none" }], { duration: 1100, easing: "cubic-bezier(.3,0,.2,1)" });
    flight.onfinish = flight.oncancel = () => block.classList.remove("flying");
  }

  clear() {
    for (const { block } of this.known.values()) block.remove();
    this.known.clear();
  }
}

/** One instance's lane. */
class Lane {
  constructor(parent, id) {
    this.row = parent.appendChild(element("div", "lane"));
    this.row.setAttribute("role", "listitem");
    this.row.dataset.instance = id;
    const left = this.row.appendChild(element("div"));
    left.append(element("div", "name", id));
    left.firstChild.title = id;
    this.counts = left.appendChild(element("div", "note"));
    this.state = left.appendChild(element("div", "note"));
    const tracks = this.row.appendChild(element("div", "tracks"));
    this.kv = new Kv(tracks);
    this.blocks = tracks.appendChild(element("div", "blocks"));
    this.blocks.setAttribute("role", "list");
    this.blocks.setAttribute("aria-label", `sequences of ${id}`);
    const right = this.row.appendChild(element("div", "numbers"));
    this.tokens = right.appendChild(element("div"));
    this.kvText = right.appendChild(element("div", "note"));
    this.pace = right.appendChild(element("div", "note"));
  }

  show(one, blocks, scale, nowMs) {
    this.row.dataset.state = one.state;
    const state = one.state === "silent" ? `silent ${span(one.age)}` : one.state;
    const moving = [one.incoming && `${one.incoming} coming`, one.outgoing && `${one.outgoing} leaving`].filter(Boolean);
    say(this.state, one.state === "ready" && moving.length ? moving.join(", ") : state);
    say(this.counts, `${one.running} run, ${one.waiting} wait`);
    this.state.classList.toggle("loud", one.state === "silent");
    this.kv.show(one);
    blocks.show(this.blocks, one, scale, nowMs);
    say(this.tokens, one.predicted > one.resident ? `${compact(one.resident)} → ${compact(one.predicted)}` : compact(one.resident));
    this.tokens.title = `${plural(one.resident, "token")} resident, ${whole(one.predicted)} predicted at the ends`;
    say(this.kvText, `KV ${percent(one.used)}${one.peak ? `, peak ${percent(one.peakPart)}` : ""}`);
    const rate = one.rate === undefined ? "" : `${compact(one.rate)}/s`;
    say(this.pace, [rate, one.step && `step ${span(one.step)}`].filter(Boolean).join(", "));
    this.pace.title = "output tokens per second, time of a step";
    this.row.setAttribute("aria-label", `${one.id}, ${one.state}, ${this.counts.textContent}, ${this.tokens.title}`);
  }
}
