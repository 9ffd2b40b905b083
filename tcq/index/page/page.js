// The search page: the address holds the search, so that a link, "back" and "reload" show it again.

const $ = (id) => document.getElementById(id);
const previews = new Map(); // features -> address of the query's picture in this tab
let latest = 0; // number of the newest search; answers to older ones are not shown

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("no answer: is tcq serve still running?");
  }
  const result = await answer.json().catch(() => ({}));
  if (answer.status === 503) throw new Error(result.error || "too many searches wait: try again");
  if (!answer.ok) throw new Error(result.error || `error ${answer.status}`);
  return result;
}

function options() {
  const chosen = new URLSearchParams();
  if ($("path").value) chosen.set("path", $("path").value);
  if ($("k").value && $("k").checkValidity()) chosen.set("k", $("k").value);
  if ($("hide").checked) chosen.set("hide_copies", "1");
  return chosen;
}

function short(path) {
  return path.split("/").pop() || path;
}

function hitElement(hit) {
  const item = $("hit").content.cloneNode(true).firstElementChild;
  const [button, image, score, name] = ["button", "img", ".score", ".name"].map((s) => item.querySelector(s));
  image.src = `api/thumbnails/${hit.id}`;
  image.alt = short(hit.path);
  image.onerror = () => image.replaceWith(document.createTextNode("not readable"));
  button.setAttribute("aria-label", `Search by ${short(hit.path)}`);
  button.onclick = () => go([["item", hit.id, hit.path]]);
  score.textContent = hit.score.toFixed(3);
  name.textContent = short(hit.path);
  name.title = hit.path;
  for (const [key, value] of Object.entries(hit.columns)) {
    if (value === null) continue;
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, text.textContent] = [key, String(value)];
    item.querySelector("dl").append(term, text);
  }
  const open = item.querySelector("a");
  open.href = `api/thumbnails/${hit.id}?side=1280`;
  open.setAttribute("aria-label", `Open ${short(hit.path)}`);
  return item;
}

function show(query, result, chosen) {
  const [kind, value, title] = query;
  const section = $("answer").content.cloneNode(true).firstElementChild;
  section.querySelector("h2").textContent = title ? `Like ${short(String(title))}` : "Like the image of this link";
  const image = section.querySelector("img");
  const source = kind === "item" ? `api/thumbnails/${value}` : previews.get(value);
  if (source) image.src = source;
  else image.remove();
  image.alt = title ? `Query ${short(String(title))}` : "Query";
  const link = new URLSearchParams(chosen);
  link.append(kind, value);
  section.querySelector(".link").href = `?${link}`;
  const list = section.querySelector("ol");
  const more = section.querySelector(".more");
  const add = (answer) => {
    list.append(...answer.hits.map(hitElement));
    const hidden = answer.hidden ? `${answer.hidden} near copies are hidden` : "";
    section.querySelector(".hidden").textContent = list.children.length ? hidden : "No image was found.";
    more.hidden = !answer.more;
  };
  add(result);
  more.onclick = async () => {
    const next = new URLSearchParams(chosen);
    next.set(kind, value);
    next.set("offset", list.children.length);
    more.disabled = true;
    const first = list.children.length;
    try {
      add(await ask(`api/search?${next}`));
      list.children[first]?.querySelector("button").focus();
      say(`${list.children.length} images are shown.`);
    } catch (error) {
      say(error.message, true);
    }
    more.disabled = false;
  };
  $("results").append(section);
  return section;
}

// Shows the answers to queries [kind, value, title], one after the other. A file is sent, and known by its features then.
async function go(queries, { push = true } = {}) {
  const number = ++latest;
  const chosen = options();
  const address = new URLSearchParams(chosen);
  const errors = [];
  $("results").replaceChildren();
  $("results").setAttribute("aria-busy", "true");
  let first = null;
  for (const [place, [kind, value, title]] of queries.entries()) {
    say(queries.length > 1 ? `Searching: ${place + 1} of ${queries.length} …` : "Searching …");
    try {
      let query = [kind, value, title];
      let result;
      if (kind === "file") {
        result = await ask(`api/search?${chosen}`, { method: "POST", body: value });
        if (!previews.has(result.features)) previews.set(result.features, URL.createObjectURL(value));
        query = ["features", result.features, title];
      } else {
        const parameters = new URLSearchParams(chosen);
        parameters.set(kind, value);
        result = await ask(`api/search?${parameters}`);
        if (kind === "item" && !title) query[2] = (await ask(`api/items/${value}`)).path;
      }
      if (number !== latest) return;
      address.append(query[0], query[1]);
      const section = show(query, result, chosen);
      first ??= section;
    } catch (error) {
      if (number !== latest) return;
      errors.push(title ? `${short(String(title))}: ${error.message}` : error.message);
    }
  }
  $("results").removeAttribute("aria-busy");
  if (first && push) history.pushState({}, "", `?${address}`);
  const count = $("results").querySelectorAll("li").length;
  say(errors.length ? errors.join("; ") : queries.length ? `${count} images are shown.` : "", errors.length > 0);
  if (first && push) first.querySelector("h2").focus({ preventScroll: true });
}

function searchFiles(files) {
  const images = [...files].filter((file) => !file.type || file.type.startsWith("image/"));
  if (images.length) go(images.map((file) => ["file", file, file.name || "pasted image"]));
  else say("These are no images.", true);
}

function queriesOfAddress() {
  const address = new URLSearchParams(location.search);
  return [...address].filter(([key]) => key === "item" || key === "features");
}

function searchAddress({ push = false } = {}) {
  const address = new URLSearchParams(location.search);
  $("path").value = address.get("path") || "";
  $("hide").checked = address.get("hide_copies") === "1";
  if (address.get("k")) $("k").value = address.get("k");
  go(queriesOfAddress(), { push });
}

$("form").onsubmit = (event) => {
  event.preventDefault();
  if (queriesOfAddress().length) go(queriesOfAddress());
};
for (const id of ["path", "k", "hide"]) {
  $(id).onchange = () => queriesOfAddress().length && go(queriesOfAddress());
}
$("file").onchange = (event) => searchFiles(event.target.files);
const zone = document.body;
zone.ondragover = (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
};
zone.ondragleave = () => $("drop").classList.remove("over");
zone.ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  searchFiles(event.dataTransfer.files);
};
document.onpaste = (event) => event.clipboardData.files.length && searchFiles(event.clipboardData.files);
window.onpopstate = () => searchAddress();

try {
  const about = await ask("api/info");
  $("about").textContent = `${about.images.toLocaleString("en")} images, ${about.bits} bits each`;
  $("k").value = about.k;
  if (!about.takes_images) $("drop").hidden = true;
  if (!latest && queriesOfAddress().length) searchAddress();
} catch (error) {
  say(error.message, true);
}
