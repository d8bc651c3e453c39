// Brings the parts together: a frame comes in, and is shown unless the operator has paused.

const byId = (id) => document.getElementById(id);
const cards = new Cards(byId("cards"));
const instances = new Instances(byId("lanes"), byId("detail"));
const rates = new Rates();
const roundLog = new Log(byId("rounds-list"), "no rescheduler has led for ten minutes");
const moveLog = new Log(byId("moves-list"), "nothing has moved yet");
let paused = false;
let newest = null;

function showBalance(decodes) {
  const ready = decodes.filter((one) => one.state === "ready");
  const resident = ready.map((one) => one.resident);
  const mean = resident.reduce((sum, count) => sum + count, 0) / (resident.length || 1);
  const text = ready.length > 1 ? `${decodes.length} instances, ${compact(mean)} tokens on average, spread ${compact(spreadOf(resident))}` : "";
  say(byId("balance"), text);
}

function showOthers(others) {
  const items = others.map((one) => {
    const item = element("li");
    item.dataset.state = one.state;
    item.append(element("span", "name", one.id));
    const kv = one.holdsKv ? `KV ${percent(one.used)}, ${one.running} run, ${one.waiting} wait` : one.role;
    item.append(element("span", "note", one.state === "ready" ? kv : `${kv}, ${one.state}`));
    return item;
  });
  byId("others").replaceChildren(...items);
}

function show(frame) {
  frame.instances ??= [];
  const cluster = readCluster(frame, rates);
  say(byId("router"), frame.router_id ?? "");
  cards.show(frame);
  instances.show(cluster.decodes, byId("order").value);
  showBalance(cluster.decodes);
  showOthers(cluster.others);
  const migrations = frame.migrations ?? [];
  instances.fly(migrations);
  roundLog.show(readRounds(frame.rounds ?? []), cluster.observedMs, writeRound);
  moveLog.show(migrations.map(readMove), cluster.observedMs, writeMove);
}

function showState(state, text) {
  const ledgerAway = state === "live" && newest && !newest.ledger_available;
  byId("status").dataset.state = ledgerAway ? "late" : state;
  say(byId("status"), ledgerAway ? "the ledger does not answer: instances as last seen" : paused && state === "live" ? "paused" : text);
  byId("key").hidden = state !== "key";
  if (state === "key") {
    say(byId("status"), "an API key is needed");
    say(byId("key-problem"), text);
    byId("key-text").focus();
  }
}

const stream = new Stream({
  onFrame(frame) {
    newest = frame;
    // A page in the background has nothing to draw for; the newest frame is shown when it comes back.
    if (!paused && !document.hidden) show(frame);
  },
  onState: showState,
});

function pause() {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  say(byId("pause"), paused ? "Go on" : "Pause");
  if (!paused && newest) show(newest);
}

function setTheme(theme) {
  document.documentElement.style.colorScheme = theme;
  localStorage.setItem("starmesh-theme", theme);
}

function turnTheme() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.style.colorScheme || (dark ? "dark" : "light");
  setTheme(now === "dark" ? "light" : "dark");
}

byId("pause").addEventListener("click", pause);
byId("theme").addEventListener("click", turnTheme);
byId("order").addEventListener("change", () => newest && show(newest));
document.addEventListener("visibilitychange", () => !document.hidden && !paused && newest && show(newest));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
  if (event.key === "p") pause();
  if (event.key === "t") turnTheme();
});
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("starmesh-key", byId("key-text").value.trim());
  byId("key-text").value = "";
  byId("key").hidden = true;
  stream.run();
});
const theme = localStorage.getItem("starmesh-theme");
if (theme === "dark" || theme === "light") document.documentElement.style.colorScheme = theme;
stream.run();
