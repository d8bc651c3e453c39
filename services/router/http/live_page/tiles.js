// Many decode instances: a tile each, with its blocks as long as they can be told apart, and moves as dots that fly.

const MOST_LANES = 14;
const MOST_ROOMY_LANES = 5;
const MOST_TILES_WITH_BLOCKS = 96;
const MOST_DOTS = 24;

class Tile {
  constructor(parent, id) {
    this.row = parent.appendChild(element("div", "tile"));
    this.row.setAttribute("role", "listitem");
    this.row.dataset.instance = id;
    this.name = this.row.appendChild(element("div", "name", id));
    this.kv = new Kv(this.row);
    this.tokens = this.row.appendChild(element("div", "note"));
    this.blocks = this.row.appendChild(element("div", "blocks"));
    this.blocks.setAttribute("role", "list");
    this.blocks.setAttribute("aria-label", `sequences of ${id}`);
  }

  show(one, blocks, scale, nowMs) {
    this.row.dataset.state = one.state;
    this.kv.show(one);
    const waiting = one.waiting ? ` +${one.waiting}` : "";
    // Without blocks a tile is narrow: what all names begin with goes without saying there.
    say(this.name, scale ? one.id : one.id.replace(/^decode-(?=.)/, ""));
    say(this.tokens, `${percent(one.used)}, ${compact(one.resident)}${scale ? `, ${one.running}${waiting}` : ""}`);
    this.blocks.hidden = !scale;
    if (scale) blocks.show(this.blocks, one, scale, nowMs);
    const text =
      `${one.id}, ${one.state}, KV ${percent(one.used)}, ${one.running} running, ${one.waiting} waiting, ` +
      `${whole(one.resident)} tokens resident, ${whole(one.predicted)} predicted at the ends`;
    this.row.setAttribute("aria-label", text);
    this.row.title = text;
  }
}

/** The decode instances, in the form that fits their number. */
class Instances {
  constructor(parent, detail) {
    this.parent = parent;
    this.blocks = new Blocks(detail);
    this.shown = new Map();
    this.form = null;
    this.dots = 0;
    this.told = null;
  }

  show(decodes, order) {
    const nowMs = Date.now();
    const form = decodes.length > MOST_LANES ? Tile : Lane;
    if (form !== this.form) {
      this.blocks.clear();
      this.parent.replaceChildren();
      this.shown.clear();
      this.form = form;
      this.parent.classList.toggle("tiles", form === Tile);
    }
    this.parent.classList.toggle("dense", decodes.length > MOST_TILES_WITH_BLOCKS);
    this.parent.classList.toggle("roomy", decodes.length <= MOST_ROOMY_LANES);
    const present = new Set(decodes.map((one) => one.id));
    for (const [id, { row }] of this.shown) {
      if (!present.has(id)) {
        row.remove();
        this.shown.delete(id);
      }
    }
    // One scale for all: a longer lane holds more, or will.
    const most = Math.max(1, ...decodes.map((one) => Math.max(one.resident, one.predicted)));
    const scale = form === Tile && decodes.length > MOST_TILES_WITH_BLOCKS ? 0 : most * 1.02;
    decodes.sort(ORDERS[order]).forEach((one, place) => {
      let shown = this.shown.get(one.id);
      if (!shown) this.shown.set(one.id, (shown = new form(this.parent, one.id)));
      if (this.parent.children[place] !== shown.row) this.parent.insertBefore(shown.row, this.parent.children[place] ?? null);
      shown.show(one, this.blocks, scale, nowMs);
    });
    this.blocks.settle(nowMs);
  }

  /** Moves that are new since the last frame: a dot flies from tile to tile. */
  fly(migrations) {
    const moved = migrations.filter((one) => one.outcome === "MIGRATION_OUTCOME_MOVED");
    const keys = new Set(moved.map(moveKey));
    if (this.told && this.form === Tile) {
      for (const one of moved) if (!this.told.has(moveKey(one))) this.dot(one.source_instance_id, one.target_instance_id);
    }
    this.told = keys;
  }

  dot(source, target) {
    const [from, to] = [this.shown.get(source)?.row, this.shown.get(target)?.row];
    if (!from || !to || still.matches || this.dots >= MOST_DOTS) return;
    const [start, end] = [from.getBoundingClientRect(), to.getBoundingClientRect()];
    const dot = document.body.appendChild(element("div", "dot"));
    const at = (box) => `translate(${box.left + box.width / 2}px, ${box.top + box.height / 2}px)`;
    dot.style.left = dot.style.top = "0";
    this.dots += 1;
    from.classList.add("sent");
    to.classList.add("received");
    const flight = dot.animate([{ transform: at(start) }, { transform: at(end) }], { duration: 1300, easing: "ease-in-out" });
    flight.onfinish = flight.oncancel = () => {
      dot.remove();
      this.dots -= 1;
      from.classList.remove("sent");
      setTimeout(() => to.classList.remove("received"), 1500);
    };
  }
}

/** Names a move. */
function moveKey(one) {
  return `${one.request_id} ${one.epoch} ${one.source_instance_id} ${one.target_instance_id}`;
}
