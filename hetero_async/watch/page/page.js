// What a run's content says, drawn. The content stands in the document (a report) or comes from the server, as it grows.

const STATES = { t: "training", s: "sending", w: "waiting", d: "dead", u: "unknown" };
const STATE_WORDS = { training: "training", sending: "training and sending", waiting: "waiting", dead: "dead", unknown: "in the run" };
const KINDS = {
  lost: ["✕", "dead", "died"], back: ["↻", "good", "came back"], left: ["←", "quiet", "left"],
  takeover: ["▲", "takeover", "took over"], started: ["●", "takeover", "was started again"],
  paused: ["‖", "bad", "log paused"], resumed: ["▶", "good", "log resumed"], finished: ["✓", "good", "all samples are trained"],
};
const OPEN_WORKERS_MAX = 8;   // of a site, that are drawn one by one without being asked for
const TABLE_WORKERS_MAX = 24; // of a run, whose table is open without being asked for
const RATE_SECONDS = 30, GROUP_SECONDS = 15;

const some = (value, shown) => value ? shown(value) : null;
const perSecond = (rate) => some(rate, (one) => `${bytes(one)}/s`);
// title, class, whether only a server that is heard tells it, and what it says of a worker
const WORKER_COLUMNS = [
  ["worker", "text", false, (one) => one.worker],
  ["site", "text", false, (one) => one.site],
  ["device", "text", true, (one) => [one.device, one.dtype].filter(Boolean).join(" ") || null],
  ["state", "text", false, (one) => one.state || null],
  ["steps/s", "", true, (one) => some(one.steps_per_second, (speed) => speed.toFixed(1))],
  ["H", "", true, (one) => some(one.steps_per_round, String)],
  ["stale", "", true, (one) => String(one.staleness)],
  ["sent", "", false, (one) => some(one.bytes_up, bytes)],
  ["received", "", false, (one) => some(one.bytes_down, bytes)],
  ["link up", "", true, (one) => perSecond(one.alive && one.usage?.upload_bytes_per_second)],
  ["link down", "", true, (one) => perSecond(one.alive && one.usage?.download_bytes_per_second)],
  ["trip", "", true, (one) => some(one.alive && one.usage?.round_trip_seconds, (seconds) => `${Math.round(1000 * seconds)} ms`)],
  ["steps", "", false, (one) => whole(one.steps)],
  ["samples", "", false, (one) => whole(one.samples)],
  ["deltas", "", false, (one) => whole(one.deltas)],
  ["refused", "", false, (one) => whole(one.refused)],
  ["lives", "", false, (one) => whole(one.incarnation)],
];

let content = null, range = "whole", isAway = false, isDrawn = false;
const opened = new Map();

// --- what the columns say ---

// Times in seconds since the run was first seen, so that they can be read off an axis.
function columnsOf(series) {
  const { slots, step, figures } = series;
  const began = content.whole.slots.length ? content.whole.slots[0] * content.whole.step : content.seconds;
  const end = (slot) => Math.min((slot + 1) * step, Math.max(content.seconds, slot * step + 1));
  const from = slots.map((slot) => slot * step - began), to = slots.map((slot) => end(slot) - began);
  // A look or two that came late are no absence of the server.
  for (let i = 0; i + 1 < to.length; i += 1) if (from[i + 1] - to[i] < Math.max(6, 1.5 * step)) to[i] = from[i + 1];
  return { from, to, step, figures, series, began };
}

// How much more there is a second, over long enough a time for it to be steady; null where nobody looked for as long.
function rates(columns, name) {
  const { to, figures, step } = columns, span = to[to.length - 1] - to[0];
  const window = Math.max(RATE_SECONDS, span / 60, 2 * step);
  let first = 0;
  return to.map((at, place) => {
    // What came in after an absence of the server was trained on in the meantime: the line breaks, the count does not.
    if (place && columns.from[place] > to[place - 1]) return null;
    while (first < place - 1 && at - to[first + 1] >= window) first += 1;
    const seconds = at - to[first];
    return seconds >= window / 2 ? Math.max(0, figures[name][place] - figures[name][first]) / seconds : null;
  });
}

const newest = (values) => values.length ? values[values.length - 1] : 0;
const clock = (seconds) => new Date(1000 * seconds).toLocaleString("en-GB", { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit" });

function sitesOf() {
  const sites = new Map();
  for (const worker of content.status.workers ?? []) {
    const site = sites.get(worker.site) ?? sites.set(worker.site, { name: worker.site, workers: [] }).get(worker.site);
    site.workers.push(worker);
  }
  for (const name of Object.keys(content.whole.sites)) if (!sites.has(name)) sites.set(name, { name, workers: [] });
  return [...sites.values()].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
}

// What a site sends (0) or receives (1) a second: over the last minutes, or in a report over all its time.
function siteRate(name, way) {
  const { to, series } = columnsOf(content.recent ?? content.whole), carried = series.carried?.[name] ?? [];
  const first = carried.findIndex((totals) => totals[0] > 0), seconds = newest(to) - to[first];
  return first >= 0 && seconds >= RATE_SECONDS / 2 ? (newest(carried)[way] - carried[first][way]) / seconds : 0;
}

// What one transfer of its workers came to lately, on average.
function linkRate(workers, way) {
  const known = workers.filter((worker) => worker.alive && worker.usage?.[way]).map((worker) => worker.usage[way]);
  return known.reduce((sum, rate) => sum + rate, 0) / (known.length || 1);
}

// --- drawing ---

function draw() {
  if (!content?.status) return;
  isDrawn = true;
  const columns = columnsOf(content[range] ?? content.whole);
  const limits = { x0: columns.from[0] ?? 0, x1: Math.max(newest(columns.to), (columns.from[0] ?? 0) + 1) };
  drawHead(columnsOf(content.recent ?? content.whole));
  drawLoss(limits, columns);
  drawSites(columns, limits);
  drawRates(columns, limits);
  drawRest(columns, limits);
  drawTables();
  drawMarks(columns.began);
}

function drawHead(now) {
  const { status } = content, share = status.positions ? status.trained / status.positions : 0;
  document.title = `${status.run} · hetero-async`;
  byId("run").textContent = status.run || "hetero-async";
  const state = isAway ? "no answer from the server" : content.is_live || status.state ? status.state || "seen from its log" : "";
  byId("state").textContent = state;
  byId("state").className = `pill ${isAway || /^(paused|stopped)/.test(state) ? "bad" : state.split(/[ :]/)[0]}`;
  const told = [`server ${status.server}`, `term ${status.term}`, `version ${whole(status.version)}`];
  if (status.durability === "replicated") told.push("replicated");
  byId("serving").textContent = told.join(" · ");
  byId("progress").firstElementChild.style.width = `${100 * share}%`;
  byId("progress").setAttribute("aria-valuenow", (100 * share).toFixed(1));
  byId("tiles").replaceChildren(...tilesOf(status, share, now).map(([title, value, more]) =>
    make("div", {}, make("dt", {}, title), make("dd", {}, value), make("dd", { class: "small" }, more))));
}

function tilesOf(status, share, now) {
  const speed = content.is_live ? newest(rates(now, "trained")) || 0 : overall("trained");
  const left = (status.positions - status.trained) / speed;
  const workers = status.workers ?? [], alive = workers.filter((worker) => worker.alive).length;
  const losses = mainLoss();
  const { figures } = content.whole;
  const refused = Math.max(newest(figures.refused), status.deltas.refused);
  const up = newest(figures.bytes_up), down = newest(figures.bytes_down);
  const { lost = 0, back = 0, started = 0, takeover = 0, paused = 0 } = content.counts;
  const faults = [[Math.max(lost, back), "worker lost", "workers lost"], [started, "restart", "restarts"], [takeover, "takeover", "takeovers"], [paused, "full disk", "full disks"]];
  const survived = faults.filter(([count]) => count).map(([count, one, many]) => `${count} ${count === 1 ? one : many}`);
  return [
    [losses.name.replace(/_/g, " ") || "loss", losses.points.length ? figure(newest(losses.points).value) : "–", losses.points.length ? `at first ${figure(losses.points[0].value)}` : "no worker has measured one"],
    ["trained", status.positions ? percent(share) : "–", `${short(status.trained)} of ${short(status.positions)}`],
    [content.is_live ? "samples/s" : "samples/s, mean", speed ? short(speed) : "–", content.is_live && speed && share < 1 ? `${duration(left)} left` : `${duration(spanned())} in all`],
    ["workers", content.is_live ? `${alive} of ${workers.length}` : `${workers.length}`, `in ${count(sitesOf().length, "site")}`],
    ["deltas", short(status.deltas.acknowledged), refused ? `${whole(refused)} refused` : "none refused"],
    ["sent to the server", up || down ? bytes(up) : "–", up || down ? `${bytes(down)} sent back` : ""],
    ...(content.is_live ? [] : [["faults survived", String(faults.reduce((sum, [number]) => sum + number, 0)), survived.join(", ") || "none met"]]),
  ];
}

const count = (number, what) => `${whole(number)} ${what}${number === 1 ? "" : "s"}`;
const spanned = () => content.whole.slots.length ? newest(columnsOf(content.whole).to) - columnsOf(content.whole).from[0] : 0;
const overall = (name) => spanned() ? newest(content.whole.figures[name]) / spanned() : 0;

function mainLoss() {
  const names = Object.keys(content.losses);
  const name = names.find((one) => one === "validation_loss") ?? names.find((one) => /loss/.test(one)) ?? names[0] ?? "";
  return { name, points: content.losses[name] ?? [] };
}

function drawLoss({ x0, x1 }, { began }) {
  const main = mainLoss().name;
  const names = Object.keys(content.losses).filter((name) => name === main || /loss/.test(name));
  const colors = [color("loss"), color("loss-1"), color("loss-2"), color("loss-3")];
  const line = (of) => (name, place) => ({ name: name.replace(/_/g, " "), color: colors[place % 4], x: content.losses[name].map(of), y: content.losses[name].map((point) => point.value) });
  const empty = "no worker has measured a loss: session.record(\"validation_loss\", value)";
  const options = { yText: figure, empty, settle: true };
  const inRange = ({ x, y, ...rest }) => { const from = x.findIndex((at) => at >= x0); return { ...rest, x: from < 0 ? [] : x.slice(from), y: from < 0 ? [] : y.slice(from) }; };
  const marks = grouped().filter(({ kind }) => kind !== "finished" && kind !== "left").map((mark) => ({ x: mark.at - began, color: color(KINDS[mark.kind][1]), text: toldOf(mark) }));
  drawLines(byId("loss-time"), names.map(line((point) => point.at - began)).map(inRange), { ...options, ...timeAxis(x0, x1), marks });
  drawLines(byId("loss-samples"), names.map(line((point) => point.trained)), { ...options, xText: (x, full) => full ? `${whole(x)} samples` : short(x), xLeast: 0 });
}

const timeAxis = (x0, x1) => ({ xLeast: x0, xMost: x1, xSteps: SECONDS, xText: (x, full) => full ? `${duration(x)} in` : duration(x) });

function drawSites(columns, { x0, x1 }) {
  const letters = Object.keys(STATES), sites = sitesOf();
  const colors = Object.fromEntries(letters.flatMap((letter, place) => [[letter, color(STATES[letter])], [place, color(STATES[letter])]]));
  const isSeen = (letter, place) => Object.values(columns.series.sites).some((shares) => shares.some((share) => share[place]));
  const hasGap = columns.from.some((from, place) => place && from > columns.to[place - 1]);
  const legend = letters.filter(isSeen).map((letter) => [colors[letter], STATE_WORDS[STATES[letter]]]);
  byId("lane-legend").replaceChildren(...[...legend, ...(hasGap ? [[color("gap"), "no server"]] : [])].map(([fill, words]) => {
    const box = make("i");
    box.style.background = fill;
    return make("span", {}, box, words);
  }));
  const old = new Map([...byId("lanes").children].map((element) => [element.dataset.site, element]));
  const elements = sites.map((site) => old.get(site.name) ?? siteElement(site.name));
  if (elements.length !== old.size || elements.some((element) => !old.has(element.dataset.site))) byId("lanes").replaceChildren(...elements, axisElement());
  sites.forEach((site, place) => drawSite(elements[place], site, columns, { x0, x1, colors, background: color("gap") }));
  drawLaneAxis(columns, { x0, x1 });
}

function siteElement(name) {
  const button = make("button", { type: "button", title: "show its workers one by one, or together" });
  button.onclick = () => { opened.set(name, !isOpen(name)); draw(); };
  const element = make("div", { class: "site" }, make("div", { class: "name" }, button, make("small"), make("span", { class: "workers" })), make("canvas"));
  element.dataset.site = name;
  return element;
}

const lanesOf = (name) => (content.status.workers ?? []).filter((worker) => worker.site === name && content[range]?.lanes[worker.worker]).map(({ worker }) => worker);
const isOpen = (name) => opened.get(name) ?? lanesOf(name).length <= OPEN_WORKERS_MAX;

function drawSite(element, site, columns, options) {
  const [button, small, labels] = element.firstElementChild.children, canvas = element.lastElementChild;
  const alive = site.workers.filter((worker) => worker.alive).length;
  button.textContent = site.name;
  small.textContent = content.is_live ? `${alive} of ${count(site.workers.length, "worker")}` : count(site.workers.length, "worker");
  const workers = isOpen(site.name) ? lanesOf(site.name) : [];
  const tall = workers.length > OPEN_WORKERS_MAX ? 5 : 15;
  const shares = columns.series.sites[site.name] ?? columns.from.map(() => [0]);
  const rows = workers.length ? workers.map((worker) => ({ lane: columns.series.lanes[worker], height: tall, gap: tall > 5 ? 4 : 1, worker })) : [{ shares, height: 34, gap: 0 }];
  labels.replaceChildren();
  drawLanes(canvas, rows, columns, options);
  hover(canvas, (x, y, box) => {
    const at = options.x0 + (x / box.width) * (options.x1 - options.x0), place = columns.from.findIndex((from, i) => from <= at && at <= columns.to[i]);
    const head = `${site.name}, ${duration(at)} in`;
    if (place < 0) return `${head}\nno server was there to see it`;
    const row = rows[Math.min(rows.length - 1, Math.floor(y / box.height * rows.length))];
    if (row.worker) return `${row.worker}, ${duration(at)} in\n${STATE_WORDS[STATES[row.lane[place]]] ?? "not in the run"}`;
    const total = shares[place].reduce((sum, share) => sum + share, 0), looks = columns.figures.looks[place];
    return [head, ...shares[place].map((share, i) => share ? `${STATE_WORDS[Object.values(STATES)[i]]}  ${(share / looks).toFixed(1)} (${percent(share / total)})` : "").filter(Boolean)].join("\n");
  });
}

const axisElement = () => make("div", { class: "axis" }, make("span"), make("svg:svg"));

function drawLaneAxis({ began }, { x0, x1 }) {
  const svg = byId("lanes").lastElementChild.lastElementChild, { width } = svg.getBoundingClientRect();
  const X = (x) => ((x - x0) / (x1 - x0 || 1)) * width;
  svg.setAttribute("viewBox", `0 0 ${width} 34`);
  svg.replaceChildren();
  drawAxis(svg, { x0, x1, X, y: 32, width, edge: { left: 0, right: 0 }, ...timeAxis(x0, x1) });
  for (const mark of grouped().filter((one) => one.at - began >= x0 && one.at - began <= x1)) {
    const [glyph, name] = KINDS[mark.kind];
    const text = make("svg:text", { class: "glyph", x: clamp(X(mark.at - began), 5, width - 5), y: 14 }, glyph);
    text.style.fill = color(name);
    text.append(make("svg:title", {}, toldOf(mark)));
    svg.append(text);
  }
}

function drawRates(columns, { x0, x1 }) {
  const line = (name, of, fill) => ({ name, color: color(fill), x: columns.to, y: rates(columns, of) });
  const options = { ...timeAxis(x0, x1), least: 0 };
  drawLines(byId("speed"), [{ ...line("samples/s", "trained", "training"), fill: true }], { ...options, yText: short });
  drawLines(byId("network"), [line("to the server", "bytes_up", "up"), line("from it", "bytes_down", "down")], { ...options, yText: (y) => bytes(y), });
}

function drawRest(columns, { x0, x1 }) {
  const last = content.staleness.length ? newest(content.staleness)[0] : 0, counts = new Map(content.staleness);
  const bars = Array.from({ length: Math.max(last + 1, 4) }, (_, age) => [age === 32 ? "32+" : String(age), counts.get(age) ?? 0]);
  drawColumns(byId("staleness"), bars, color("training"), (age, number, total) => `staleness ${age}: ${whole(number)} deltas, ${percent(number / total)}`);
  const refusals = Object.entries(content.refusals).sort((a, b) => b[1] - a[1]).slice(0, 8);
  byId("refusals").replaceChildren(...refusals.map(([why, number]) => {
    const bar = make("u");
    bar.style.width = `${100 * number / refusals[0][1]}%`;
    return make("div", { class: "bar" }, make("span", {}, why), make("b", {}, whole(number)), bar);
  }));
  if (!refusals.length) drawNothing(byId("refusals"), "none was refused");
  const line = (name, of, fill) => ({ name, color: color(fill), x: columns.to, y: columns.figures[of], isStep: true });
  const lines = [line("unconfirmed", "unreleased", "down"), line("standby", "standby_lag", "up")];
  const hasStandby = content.status.standbys?.length || content.status.standby || columns.figures.standby_lag.some(Boolean) || columns.figures.unreleased.some(Boolean);
  drawLines(byId("lag"), hasStandby ? lines : [], { ...timeAxis(x0, x1), least: 0, yText: short, empty: "there is no standby: what is on this disk is acknowledged" });
}

function table(element, titles, rows) {
  const cells = (name, row) => row.map((cell, place) => make(name, { class: titles[place][1] ?? "" }, cell ?? "–"));
  const body = rows.map(({ row, away }) => make("tr", { class: away ? "away" : "" }, ...cells("td", row)));
  element.replaceChildren(make("thead", {}, make("tr", {}, ...cells("th", titles.map(([title]) => title)))), make("tbody", {}, ...body));
}

function shareCell(share) {
  const bar = make("i");
  bar.style.width = `${100 * share}%`;
  return make("span", {}, make("span", { class: "share" }, bar), percent(share));
}

function drawTables() {
  const workers = content.status.workers ?? [], all = workers.reduce((sum, worker) => sum + worker.samples, 0) || 1;
  const sum = (of, name) => of.reduce((total, worker) => total + (worker[name] || 0), 0);
  const sites = sitesOf().map((site) => {
    const shares = (content.whole.sites[site.name] ?? []).reduce((total, share) => total.map((one, i) => one + share[i]), [0, 0, 0, 0, 0]);
    const seen = shares.slice(0, 4).reduce((total, share) => total + share, 0);
    const part = (number) => seen ? percent(number / seen) : null;
    const own = site.workers;
    return { row: [site.name, String(own.length), shareCell(sum(own, "samples") / all), whole(sum(own, "samples")), whole(sum(own, "deltas")), whole(sum(own, "refused")),
      some(sum(own, "bytes_up"), bytes), perSecond(siteRate(site.name, 0)), perSecond(linkRate(own, "upload_bytes_per_second")),
      some(sum(own, "bytes_down"), bytes), perSecond(siteRate(site.name, 1)), perSecond(linkRate(own, "download_bytes_per_second")),
      part(shares[0] + shares[1]), part(shares[2]), part(shares[3])] };
  });
  table(byId("by-site"), [["site", "text"], ["workers"], ["share of samples", "text"], ["samples"], ["deltas"], ["refused"], ["sent"], ["a second"], ["link up"], ["received"], ["a second"], ["link down"], ["training"], ["waiting"], ["dead"]], sites);
  byId("all-workers").hidden = !workers.length;
  if (!byId("all-workers").dataset.isSet && workers.length) {
    byId("all-workers").dataset.isSet = "yes";
    byId("all-workers").open = workers.length <= TABLE_WORKERS_MAX;
    byId("all-workers").ontoggle = drawTables;
  }
  if (!byId("all-workers").open) return;
  const columns = WORKER_COLUMNS.filter(([, , isLive]) => content.is_live || !isLive);
  table(byId("workers"), columns, workers.map((one) => ({ away: !one.alive, row: columns.map(([, , , of]) => of(one)) })));
}

// What happens to many workers of a site at one time is one event.
function grouped() {
  const groups = [];
  for (const mark of content.marks) {
    const like = mark.site && groups.findLast((group) => group.kind === mark.kind && group.site === mark.site && mark.at - group.at < GROUP_SECONDS);
    if (like) like.workers += 1; else groups.push({ ...mark, workers: 1 });
  }
  return groups.map((group) => group.workers > 1 ? { ...group, who: `${group.workers} workers of ${group.site}`, text: "" } : group);
}

function toldOf(mark) {
  return [mark.who, KINDS[mark.kind][2]].filter(Boolean).join(" ") + (mark.text ? ` (${mark.text})` : "");
}

function drawMarks(began) {
  const marks = grouped().slice(-40).reverse();
  byId("marks").replaceChildren(...marks.map((mark) => {
    const glyph = make("span", {}, KINDS[mark.kind][0]);
    glyph.style.color = color(KINDS[mark.kind][1]);
    const time = make("time", { title: clock(mark.at) }, `${duration(mark.at - began)} in`);
    return make("li", {}, time, glyph, make("span", {}, toldOf(mark)));
  }));
  if (!marks.length) byId("marks").replaceChildren(make("li", { class: "empty" }, "nothing has happened to it"));
  const what = content.is_live ? `as of ${clock(content.seconds)}` : `report of ${clock(content.made_seconds)}`;
  byId("foot").textContent = [what, ...(content.notes ?? [])].join(" · ");
}

// --- where it comes from ---

// A tail of columns takes the place of those that we have from there on.
function joined(old, tail) {
  const keep = old.slots.findIndex((slot) => slot >= tail.slots[0]), from = keep < 0 ? old.slots.length : keep;
  const drop = tail.most ? Math.max(0, from + tail.slots.length - tail.most) : 0;
  const slots = [...old.slots.slice(drop, from), ...tail.slots], before = from - drop;
  const lists = (were, are, nothing) => Object.fromEntries(Object.keys(are).map((name) => [name, [...(were[name]?.slice(drop, from) ?? Array(before).fill(nothing)), ...are[name]]]));
  const lanes = Object.fromEntries(Object.keys(tail.lanes).map((name) => [name, (old.lanes[name]?.slice(drop, from) ?? "-".repeat(before)) + tail.lanes[name]]));
  return { ...tail, slots, figures: lists(old.figures, tail.figures, 0), sites: lists(old.sites, tail.sites, [0, 0, 0, 0, 0]), carried: lists(old.carried ?? {}, tail.carried ?? {}, [0, 0]), lanes };
}

function follow() {
  const source = new EventSource("events");
  source.addEventListener("all", (event) => { isAway = false; content = JSON.parse(event.data); draw(); });
  source.addEventListener("new", (event) => {
    const tail = JSON.parse(event.data);
    content = { ...tail, whole: joined(content.whole, tail.whole), recent: joined(content.recent, tail.recent) };
    draw();
  });
  source.onerror = () => {
    isAway = true;
    if (isDrawn) draw();
    // A browser gives up for good on an answer that is not a stream: the server may be full, or only just begin.
    if (source.readyState === EventSource.CLOSED) { setTimeout(follow, 5000); }
  };
}

for (const button of document.querySelectorAll("#ranges button")) {
  button.onclick = () => {
    range = button.dataset.range;
    for (const other of document.querySelectorAll("#ranges button")) other.setAttribute("aria-pressed", String(other === button));
    draw();
  };
}
addEventListener("resize", () => requestAnimationFrame(draw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("beforeprint", draw);

if (byId("content").textContent) {
  content = JSON.parse(byId("content").textContent);
  draw();
} else {
  byId("ranges").hidden = false;
  follow();
}
