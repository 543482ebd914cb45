"use strict";

const $ = (id) => document.getElementById(id);
let token = "";
let about = null;
const latest = {}; // of each place, the newest request: an older answer that comes late is dropped

async function ask(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { method: body ? "POST" : "GET", body, headers });
  if (!response.ok) {
    if (response.status === 401) $("token-form").hidden = false;
    const answer = await response.json().catch(() => ({}));
    throw new Error(answer.detail || `The service answered with ${response.status}.`);
  }
  return response;
}

function say(place, text, isError) {
  place.textContent = text;
  place.classList.toggle("error", Boolean(isError));
}

async function answered(name, place, work) {
  const number = (latest[name] = (latest[name] || 0) + 1);
  const isLatest = () => latest[name] === number;
  say(place, "…");
  try {
    await work(isLatest);
  } catch (error) {
    const text = error instanceof TypeError ? "The service can't be reached." : error.message;
    if (isLatest()) say(place, text, true);
  }
}

async function begin() {
  await answered("about", $("encoder"), async () => {
    about = await (await ask("/about")).json();
    $("token-form").hidden = true;
    const e = about.encoder;
    say($("encoder"), `${e.name}, ${e.method}, step ${e.step}; ${e.precision} on ${about.provider}; ` +
      (about.index ? `${about.index.vectors.toLocaleString("en")} vectors to search` : "no index"));
    $("search").hidden = !about.index;
    $("text-form").hidden = !about.has_text;
  });
}

function watch(letter, changed) {
  const input = $(`image-${letter}`);
  const drop = input.closest(".drop");
  const image = $(`preview-${letter}`);
  let url = "";
  input.addEventListener("change", () => {
    URL.revokeObjectURL(url);
    image.hidden = !input.files.length;
    if (!input.files.length) return;
    image.src = url = URL.createObjectURL(input.files[0]);
    image.onerror = () => { image.hidden = true; }; // a format that the browser doesn't show, the service may read
    changed();
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind !== "drop" || !event.dataTransfer.files.length) return;
      const one = new DataTransfer();
      one.items.add(event.dataTransfer.files[0]);
      input.files = one.files;
      input.dispatchEvent(new Event("change"));
    });
  }
}

function compare() {
  const [a, b] = ["a", "b"].map((letter) => $(`image-${letter}`).files[0]);
  if (!a || !b) return;
  $("scale").hidden = true;
  answered("pair", $("pair-result"), async (isLatest) => {
    const body = new FormData();
    body.append("a", a);
    body.append("b", b);
    const found = await (await ask("/similarity", body)).json();
    if (!isLatest()) return;
    const sentence = `Cosine ${found.cosine.toFixed(3)}: more alike than ${found.percentile_random.toFixed(1)} % of random ` +
      `pairs, and than ${found.percentile_positive.toFixed(1)} % of pairs of views of one image.`;
    say($("pair-result"), sentence);
    draw(found.cosine, sentence);
  });
}

function svg(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text) element.textContent = text;
  return element;
}

function draw(cosine, sentence) {
  const { random, positive } = about.cosines;
  const [width, floor, top, bins] = [600, 160, 12, 60];
  const low = Math.min(random[0], positive[0], cosine), high = Math.max(1, cosine);
  const x = (value) => 15 + ((value - low) / (high - low || 1)) * (width - 30);
  const histogram = (quantiles) => { // evenly spaced quantiles are a sample of the distribution
    const counts = new Array(bins).fill(0);
    for (const value of quantiles) {
      counts[Math.max(0, Math.min(bins - 1, Math.floor(((value - low) / (high - low || 1)) * bins)))] += 1;
    }
    return counts;
  };
  const chart = $("chart");
  chart.replaceChildren($("chart-title"));
  $("chart-title").textContent = sentence;
  for (const [name, quantiles] of [["random", random], ["positive", positive]]) {
    const counts = histogram(quantiles), highest = Math.max(...counts);
    let path = `M15 ${floor}`;
    counts.forEach((count, bin) => {
      const y = floor - (count / highest) * (floor - top);
      path += `L${15 + (bin / bins) * (width - 30)} ${y}L${15 + ((bin + 1) / bins) * (width - 30)} ${y}`;
    });
    chart.append(svg("path", { class: name, d: `${path}L${width - 15} ${floor}Z` }));
  }
  chart.append(svg("line", { class: "mark", x1: x(cosine), x2: x(cosine), y1: 4, y2: floor + 6 }));
  for (const [value, anchor] of [[low, "start"], [(low + high) / 2, "middle"], [high, "end"]]) {
    chart.append(svg("text", { x: x(value), y: 180, "text-anchor": anchor }, value.toFixed(2)));
  }
  $("scale").hidden = false;
}

function search(name, value) {
  $("neighbours").replaceChildren();
  answered("search", $("search-result"), async (isLatest) => {
    const body = new FormData();
    body.append(name, value);
    body.append("k", "12");
    const found = (await (await ask("/search", body)).json()).neighbours;
    if (!isLatest()) return;
    say($("search-result"), `${found.length} neighbours, the nearest first.`);
    for (const neighbour of found) {
      const item = document.createElement("li");
      const name = neighbour.class ?? neighbour.path ?? `item ${neighbour.id}`;
      if (neighbour.picture) {
        const image = document.createElement("img");
        image.alt = name;
        ask(neighbour.picture).then((answer) => answer.blob()).then((blob) => {
          const url = URL.createObjectURL(blob);
          image.onload = () => URL.revokeObjectURL(url);
          image.src = url;
        }).catch(() => image.remove());
        item.append(image);
      }
      item.append(`${name} · ${neighbour.score.toFixed(3)}`);
      $("neighbours").append(item);
    }
  });
}

for (const letter of ["a", "b"]) watch(letter, compare);
watch("q", () => search("image", $("image-q").files[0]));
$("text-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("text").value.trim()) search("text", $("text").value);
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  begin();
});
for (const kind of ["dragover", "drop"]) window.addEventListener(kind, (event) => event.preventDefault());
begin();
