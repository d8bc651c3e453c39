// The cards on top: this router's requests, tokens and latencies.

const SVG = "http://www.w3.org/2000/svg";

/** A line through the values above 0, broken where there are none. */
function sparkPath(values, width, height) {
  const most = Math.max(...values, 1e-9);
  let path = "";
  let drawing = false;
  values.forEach((value, place) => {
    if (value > 0) {
      const x = (place / Math.max(1, values.length - 1)) * width;
      const y = height - 2 - (value / most) * (height - 4);
      path += `${drawing ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      if (!drawing) path += `h.01`;
    }
    drawing = value > 0;
  });
  return path;
}

class CountCard {
  constructor(parent, title) {
    const card = element("div", "card");
    card.append(element("h2", "", title));
    this.count = card.appendChild(element("b"));
    this.number = this.count.appendChild(element("span"));
    this.unit = this.count.appendChild(element("small"));
    this.first = card.appendChild(element("p"));
    this.second = card.appendChild(element("p"));
    parent.append(card);
  }

  show(number, unit, first, second) {
    say(this.number, number);
    say(this.unit, ` ${unit}`);
    say(this.first, first);
    say(this.second, second);
    this.first.title = first;
    this.second.title = second;
  }
}

class LatencyCard {
  constructor(parent, title, meaning) {
    const card = element("div", "card");
    card.append(element("h2", "", title));
    card.title = meaning;
    const list = card.appendChild(element("dl", "quantiles"));
    this.values = {};
    for (const quantile of ["p50", "p90", "p99"]) {
      const pair = list.appendChild(element("div"));
      pair.append(element("dt", "", quantile));
      this.values[quantile] = pair.appendChild(element("dd", "", "–"));
    }
    this.spark = document.createElementNS(SVG, "svg");
    this.spark.setAttribute("class", "spark");
    this.spark.setAttribute("viewBox", "0 0 300 22");
    this.spark.setAttribute("preserveAspectRatio", "none");
    this.spark.setAttribute("role", "img");
    this.path = this.spark.appendChild(document.createElementNS(SVG, "path"));
    this.title = title;
    card.append(this.spark);
    parent.append(card);
  }

  show(latency, window) {
    for (const [quantile, target] of Object.entries(this.values)) {
      say(target, latency?.[quantile] ? span(seconds(latency[quantile])) : "–");
    }
    const history = (latency?.p99_history ?? []).map(seconds);
    this.path.setAttribute("d", sparkPath(history, 300, 22));
    const most = Math.max(0, ...history);
    this.spark.setAttribute("aria-label", `p99 of ${this.title} over ${span(window)}, at most ${span(most)}`);
  }
}

class Cards {
  constructor(parent) {
    this.requests = new CountCard(parent, "Requests");
    this.tokens = new CountCard(parent, "Tokens");
    this.predictor = new CountCard(parent, "Predictor");
    this.latencies = {
      ttft: new LatencyCard(parent, "TTFT", "From a request's receipt to its first token"),
      tpot: new LatencyCard(parent, "TPOT", "From one token to the next, averaged over each request"),
      end_to_end: new LatencyCard(parent, "End to end", "From a request's receipt to its last token"),
    };
  }

  show(frame) {
    const activity = frame.activity ?? {};
    const window = seconds(activity.window);
    const perSecond = activity.requests_per_second ?? 0;
    const failed = Number(activity.failed_requests ?? 0);
    this.requests.show(
      whole(frame.active_requests ?? 0),
      "active",
      `${whole(frame.queued_requests ?? 0)} queued, ${perSecond.toFixed(1)}/s`,
      `${whole(Number(activity.finished_requests ?? 0))} done, ${whole(failed)} failed`,
    );
    const sequences = frame.instances.reduce((sum, one) => sum + (one.load?.running_sequences ?? 0), 0);
    const waiting = frame.instances.reduce((sum, one) => sum + (one.load?.waiting_sequences ?? 0), 0);
    this.tokens.show(
      compact(activity.tokens_per_second ?? 0),
      "/ s",
      `${whole(sequences)} running`,
      `${whole(waiting)} waiting`,
    );
    const known = frame.predictor?.qualities?.filter((one) => Number(one.estimates ?? 0) > 0) ?? [];
    const estimates = known.reduce((sum, one) => sum + Number(one.estimates), 0);
    const mae = known.reduce((sum, one) => sum + Number(one.estimates) * (one.mae_tokens ?? 0), 0) / (estimates || 1);
    const within = known.reduce((sum, one) => sum + Number(one.estimates) * (one.coverage ?? 0), 0) / (estimates || 1);
    this.predictor.show(
      estimates ? `±${compact(mae)}` : frame.predictor ? "–" : "none",
      estimates ? "tokens" : "",
      frame.predictor?.version ?? "by current load only",
      estimates ? `${percent(within)} within bound` : "",
    );
    for (const [name, card] of Object.entries(this.latencies)) card.show(activity[name], window);
  }
}
