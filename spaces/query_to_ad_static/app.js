// The student in the browser: transformers.js encodes the query, a loop over int8 vectors finds the ads.
// recipes/static_space.py writes what is fetched here: about.json, ads.json, vectors.bin, student/ and lib/.
import { AutoModel, AutoTokenizer, env } from "./lib/transformers.min.js";

const HERE = new URL(".", import.meta.url).href;
const MAX_QUERY = 1000; // characters
const MAX_K = 50;
const SHOWN = { title: 120, text: 240, brand: 40, price: 24, url: 80 }; // characters

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL(HERE).pathname; // of a whole address it would not look whether a file is there
env.useBrowserCache = false; // the server's own caching rules hold: a new student is never mixed with an old one
env.backends.onnx.wasm.wasmPaths = `${HERE}lib/`;
env.backends.onnx.wasm.numThreads = 1; // more need response headers that plain file servers do not send

const at = (id) => document.getElementById(id);

async function fetched(name) {
  const response = await fetch(HERE + name);
  if (!response.ok) throw new Error(`expected ${name} beside this page, found HTTP ${response.status}`);
  return response;
}

/** Model, tokenizer, ads and vectors; the settings in about.json say how they belong together. */
async function load() {
  const [about, ads, buffer] = await Promise.all([
    fetched("about.json").then((r) => r.json()),
    fetched("ads.json").then((r) => r.json()),
    fetched("vectors.bin").then((r) => r.arrayBuffer()),
  ]);
  const expected = about.ads * (about.dim + 4);
  if (buffer.byteLength !== expected || ads.length !== about.ads) {
    throw new Error(
      `expected ${about.ads} ads and ${expected} bytes of vectors, found ${ads.length} and ${buffer.byteLength}; build this folder again`,
    );
  }
  const [tokenizer, model] = await Promise.all([
    AutoTokenizer.from_pretrained("student"),
    AutoModel.from_pretrained("student", {
      dtype: about.dtype, device: "wasm", use_external_data_format: about.weights_beside,
    }),
  ]);
  const scales = new Float32Array(buffer, 0, about.ads);
  const codes = new Int8Array(buffer, 4 * about.ads);
  return { about, ads, scales, codes, tokenizer, model };
}

/** Float32Array (dim), L2-normalised by the graph itself. */
async function encode({ about, tokenizer, model }, text) {
  const inputs = await tokenizer(about.prompt + text, { truncation: about.max_tokens !== null, max_length: about.max_tokens });
  const { sentence_embedding: vector } = await model(inputs);
  return vector.data;
}

/** [[row, score], ...] of the k ads with the largest dot product, best first. */
function search({ about, scales, codes }, vector, k) {
  const best = [];
  for (let row = 0; row < about.ads; row++) {
    let sum = 0;
    const start = row * about.dim;
    for (let i = 0; i < about.dim; i++) sum += codes[start + i] * vector[i];
    const score = sum * scales[row];
    if (best.length < k || score > best[best.length - 1][1]) {
      let place = best.length;
      while (place > 0 && best[place - 1][1] < score) place--;
      best.splice(place, 0, [row, score]);
      if (best.length > k) best.pop();
    }
  }
  return best;
}

/** One line without control characters, which could turn the reading direction or hide text. */
function clean(text) {
  return String(text ?? "")
    .replace(/\s+/gu, " ")
    .replace(/[^\u200c\u200d\P{C}]/gu, "")
    .trim();
}

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text; // never markup: ads are strangers' text
  if (kind) made.className = kind;
  return made;
}

/** `text`, cut, of its own reading direction, the words of the query marked. */
function shown(text, limit, words) {
  const whole = clean(text);
  const cut = whole.length > limit ? `${whole.slice(0, limit - 1).trimEnd()}…` : whole;
  const made = element("bdi");
  for (const part of cut.split(/([\p{L}\p{N}]+)/u)) {
    made.append(words.has(part.toLowerCase()) ? element("mark", part) : part);
  }
  return made;
}

function card(ad, rank, score, words, alsoTeacher) {
  const item = element("li");
  const top = element("p", undefined, "top");
  if (ad.url) top.append(shown(ad.url, SHOWN.url, new Set()), " ");
  if (alsoTeacher) top.append(element("span", "the teacher finds it too", "too"));
  if (top.childNodes.length) item.append(top);
  const title = element("h2", `${rank}. `);
  title.append(shown(ad.title || ad.id, SHOWN.title, words));
  item.append(title);
  if (ad.text) item.append(element("p"));
  if (ad.text) item.lastChild.append(shown(ad.text, SHOWN.text, words));
  const about = element("p", undefined, "about");
  for (const name of ["brand", "price"]) if (ad[name]) about.append(shown(ad[name], SHOWN[name], new Set()), " · ");
  about.append(`score ${score.toFixed(3)}`);
  item.append(about);
  return item;
}

async function answer(loaded) {
  const { about, ads } = loaded;
  const k = Math.min(MAX_K, Math.max(1, Math.round(Number(at("k").value) || 10)));
  let text = clean(at("query").value);
  let note = "";
  if (text.length > MAX_QUERY) {
    note = ` Cut to its first ${MAX_QUERY.toLocaleString("en")} characters.`;
    text = text.slice(0, MAX_QUERY);
  }
  if (!text) {
    at("results").replaceChildren();
    at("status").textContent = "Type a query first: a few words, as a shopper would.";
    return;
  }
  const started = performance.now();
  const vector = await encode(loaded, text);
  const encoded = performance.now();
  const found = search(loaded, vector, k);
  const ended = performance.now();
  const words = new Set(text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? []);
  const known = about.examples.find((one) => one.text.toLowerCase() === text.toLowerCase());
  const taught = new Set(known ? known.teacher.slice(0, k) : []);
  at("results").replaceChildren(
    ...found.map(([row, score], place) => card(ads[row], place + 1, score, words, taught.has(ads[row].id))),
  );
  const ms = (value) => `${value.toFixed(1)} ms`;
  let said = `Encoded in ${ms(encoded - started)}, searched ${about.ads.toLocaleString("en")} ads in ${ms(ended - encoded)}.`;
  if (known?.teacher.length) { // an example whose vector the teacher has not stored cannot be compared
    const both = found.filter(([row]) => taught.has(ads[row].id)).length;
    said += ` The teacher finds ${both} of these ${found.length} too (overlap@${k}).`;
  }
  at("status").textContent = said + note;
  at("results").dataset.query = text;
}

function failed(error) {
  console.warn(error);
  at("status").hidden = true;
  at("error").hidden = false;
  at("error").textContent =
    `This did not work: ${error.message ?? error}. Build the folder again with recipes/static_space.py, and serve it over HTTP.`;
}

async function start() {
  const loaded = await load();
  const { about } = loaded;
  at("synthetic").hidden = !about.synthetic;
  at("examples-label").textContent = about.examples_label;
  at("examples-label").hidden = about.examples.length === 0;
  for (const { text } of about.examples) {
    const button = element("button", text);
    button.type = "button";
    button.addEventListener("click", () => {
      at("query").value = text;
      at("form").requestSubmit();
    });
    at("examples").append(button);
  }
  for (const [name, value] of about.facts) at("facts").append(element("dt", name), element("dd", value));
  let turn = Promise.resolve(); // one query after the other: the model runs one at a time
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    turn = turn.then(() => answer(loaded)).catch(failed);
  });
  at("go").disabled = false;
  if (!at("query").value && about.examples.length) at("query").value = about.examples[0].text;
  search(loaded, await encode(loaded, "warm up"), MAX_K); // the first calls are the slowest
  at("form").requestSubmit();
}

start().catch(failed);
