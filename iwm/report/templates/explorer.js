// Script of the explorer (iwm/report/explorer.py). Ranks are those of MRR (iwm/evaluation/bank.py): L2 distances between
// pooled features, with a tie tolerance relative to the true view's norm.
"use strict";

for (const root of document.querySelectorAll(".explorer")) start(root);

function start(root) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const axes = Object.entries(data.axes).map(([name, values]) => ({ name, count: values.length }));
  const photographs = data.photographs.map(decode);
  const find = (selector) => root.querySelector(selector);
  const canvases = Object.fromEntries(
    ["source", "true", "retrieved"].map((role) => [role, find(`figure.${role} canvas`)]));
  const sliders = new Map([...root.querySelectorAll("input[type=range]")].map((input) => [input.name, input]));
  let ranks = [];

  function decode(photograph) {
    const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
    const picture = new Image();
    picture.src = photograph.picture;
    return {
      picture,
      scale: photograph.scale,
      points: new Int16Array(bytes(photograph.points)),
      norms: new Float32Array(bytes(photograph.norms)),
    };
  }

  // Return the state of the controls: photograph, source, index on each axis, and index of the true view.
  function read() {
    const chosen = (what) => Number(find(`.${what} input:checked`).value);
    const at = axes.map((axis) => Number(sliders.get(axis.name)?.value ?? 0));
    return { photograph: photographs[chosen("photographs")], source: chosen("sources"), at, view: viewAt(at) };
  }

  function viewAt(at) {
    return at.reduce((view, place, a) => view * axes[a].count + place, 0);
  }

  function placesOf(view) {
    const at = [];
    for (let a = axes.length - 1, rest = view; a >= 0; rest = Math.floor(rest / axes[a--].count)) {
      at.unshift(rest % axes[a].count);
    }
    return at;
  }

  // Return the distances from the prediction with the action to `view` to all views.
  function distancesFrom({ photograph: { points, scale }, source }, view) {
    const size = points.length / ((1 + data.sources.length) * data.bank);
    const prediction = ((1 + source) * data.bank + view) * size;
    const distances = new Float64Array(data.bank);
    for (let v = 0; v < data.bank; v++) {
      let sum = 0;
      for (let c = 0; c < size; c++) {
        const difference = points[prediction + c] - points[v * size + c];
        sum += difference * difference;
      }
      distances[v] = scale * Math.sqrt(sum);
    }
    return distances;
  }

  function rankOf(view, distances, { photograph: { norms } }) {
    const tolerance = data.tie * norms[view];
    let nearer = 0, tied = 0;
    for (const distance of distances) {
      if (distance < distances[view] - tolerance) nearer++;
      else if (distance <= distances[view] + tolerance) tied++;
    }
    return nearer + (tied + 1) / 2;
  }

  function words(at, source) {
    const parts = axes.map((axis, a) => data.words[axis.name][at[a]]);
    if (source !== undefined) parts.push(data.sources[source].words);
    return parts.filter(Boolean).map((part) => part.replace(/ /g, "\u00a0")).join(", ") || "nothing";
  }

  function show(canvas, photograph, cell, label) {
    canvas.width = canvas.height = data.side;
    canvas.dataset.cell = cell;
    if (label) canvas.setAttribute("aria-label", label);
    const x = (cell % data.columns) * data.side, y = Math.floor(cell / data.columns) * data.side;
    canvas.getContext("2d").drawImage(photograph.picture, x, y, data.side, data.side, 0, 0, data.side, data.side);
  }

  // Update after a new photograph or source: ranks of all actions, for the map and the buttons.
  function choose() {
    const now = read();
    ranks = Array.from({ length: data.bank }, (_, view) => rankOf(view, distancesFrom(now, view), now));
    const score = ranks.reduce((sum, rank) => sum + 1 / rank, 0) / data.bank;
    find(".score").textContent = `MRR ${score.toFixed(3)}`;
    move();
  }

  // Update after a slider moved: the view nearest to the prediction.
  function move() {
    const now = read();
    const distances = distancesFrom(now, now.view);
    const retrieved = distances.reduce((best, distance, view) => (distance < distances[best] ? view : best), 0);
    const rank = rankOf(now.view, distances, now);
    const state = data.sources[now.source].name;
    show(canvases.source, now.photograph, data.bank + now.source, `the photograph, ${state}`);
    show(canvases.true, now.photograph, now.view, `true view: ${words(now.at)}`);
    show(canvases.retrieved, now.photograph, retrieved, `nearest view: ${words(placesOf(retrieved))}`);
    find(".views").classList.toggle("right", retrieved === now.view);
    find(".answer").innerHTML =
      `Action: <b>${words(now.at, now.source)}</b>. The prediction ranks the true view ` +
      `<b class="rank">${rank}</b> of ${data.bank}` +
      (retrieved === now.view ? "." : `; the nearest view is <b>${words(placesOf(retrieved))}</b>.`);
    find(".true figcaption").textContent = `true view: rank ${rank}`;
    drawSliders(now, distances);
    drawProfile(distances, rank);
    drawMap(now, retrieved);
  }

  // The state as the page's fragment: #explorer=NAME&photograph=2&source=blur&brightness=4&… Photographs count from 1,
  // values of an axis from 0.
  function fragment() {
    const state = new URLSearchParams({ explorer: root.dataset.name });
    state.set("photograph", 1 + Number(find(".photographs input:checked").value));
    state.set("source", data.sources[Number(find(".sources input:checked").value)].name);
    for (const [name, input] of sliders) state.set(name, input.value);
    return `#${state}`;
  }

  // Select what a fragment names. Return false, and change nothing, where it does not name a state of this explorer.
  function restore(hash) {
    const state = new URLSearchParams(hash.slice(1));
    if (state.get("explorer") !== root.dataset.name) return false;
    const index = (name, count) => {
      const text = state.get(name) ?? "";
      return /^\d{1,4}$/.test(text) && Number(text) < count ? Number(text) : -1;
    };
    const photograph = index("photograph", photographs.length + 1) - 1;
    const source = data.sources.findIndex(({ name }) => name === state.get("source"));
    const places = new Map([...sliders].map(([name, input]) => [input, index(name, Number(input.max) + 1)]));
    if ([photograph, source, ...places.values()].some((place) => place < 0)) return false;
    root.querySelectorAll(".photographs input")[photograph].checked = true;
    root.querySelectorAll(".sources input")[source].checked = true;
    for (const [input, place] of places) input.value = place;
    choose();
    root.scrollIntoView();
    return true;
  }

  // Browsers limit how often the address may change: write it when the controls have rested.
  let rest;
  function remember() {
    clearTimeout(rest);
    rest = setTimeout(() => history.replaceState(history.state, "", fragment()), 200);
  }

  function go(view) {
    placesOf(view).forEach((place, a) => {
      if (sliders.has(axes[a].name)) sliders.get(axes[a].name).value = place;
    });
    move();
    remember();
  }

  const buttons = {
    nothing: () => viewAt(axes.map(({ name, count }) => {
      const unchanged = data.words[name].indexOf("");
      return unchanged >= 0 ? unchanged : Math.floor(count / 2);
    })),
    random: () => Math.floor(Math.random() * data.bank),
    best: () => ranks.indexOf(Math.min(...ranks)),
    worst: () => ranks.indexOf(Math.max(...ranks)),
  };

  // Draw the distances along each slider with the others fixed, all on one scale.
  function drawSliders(now, distances) {
    const lines = axes.map((axis, a) => Array.from({ length: axis.count }, (_, place) =>
      distances[viewAt(now.at.map((old, b) => (b === a ? place : old)))]));
    const low = Math.min(...lines.flat()), high = Math.max(...lines.flat());
    axes.forEach(({ name, count }, a) => {
      const input = sliders.get(name);
      if (!input) return;
      const label = data.words[name][now.at[a]] || "unchanged";
      input.setAttribute("aria-valuetext", label);
      input.parentNode.querySelector("output").textContent = label.replace(`${name} `, "");
      const place = (i) => [(100 * i) / (count - 1), 24 - 20 * share(lines[a][i], low, high)];
      const dot = (i, kind) => `<path class="${kind}" d="M${place(i)}h0"/>`;
      const nearest = lines[a].indexOf(Math.min(...lines[a]));
      input.parentNode.querySelector("svg").innerHTML =
        `<polyline class="line s1" points="${lines[a].map((_, i) => place(i).join()).join(" ")}"/>` +
        dot(now.at[a], "at true") + dot(nearest, "at nearest");
    });
  }

  // Draw the sorted distances over their rank on a logarithmic axis, because the first ranks matter most.
  function drawProfile(distances, rank) {
    const sorted = [...distances].sort((a, b) => a - b);
    const low = sorted[0], high = sorted[sorted.length - 1];
    const x = (place) => 14 + (332 * Math.log(place)) / Math.log(data.bank);
    const y = (distance) => 168 - 140 * share(distance, low, high);
    const ticks = [1, 10, 100, 1000].filter((place) => 2 * place < data.bank).concat(data.bank);
    const at = x(rank), height = y(sorted[Math.round(rank) - 1]);
    const end = at > 180 ? "end" : "start";
    const profile = find(".profile");
    profile.setAttribute("aria-label",
      `distances from ${low.toFixed(3)} to ${high.toFixed(3)}; the true view has rank ${rank}`);
    profile.innerHTML =
      ticks.map((place) => `<line class="grid" x1="${x(place)}" x2="${x(place)}" y1="20" y2="172"/>` +
        `<text x="${x(place)}" y="190" text-anchor="middle">${place}</text>`).join("") +
      `<text x="0" y="12">largest distance ${high.toFixed(2)}</text>` +
      `<polyline class="line s1" points="${sorted.map((d, i) => `${x(i + 1).toFixed(1)},${y(d).toFixed(1)}`).join(" ")}"/>` +
      `<circle class="nearest" cx="${x(1)}" cy="${y(low)}" r="5"/>` +
      `<line class="true" x1="${at}" x2="${at}" y1="20" y2="172"/><circle class="ring" cx="${at}" cy="${height}" r="6"/>` +
      `<text x="${at + (end === "start" ? 8 : -8)}" y="28" text-anchor="${end}">true view: rank ${rank}</text>`;
  }

  // Draw one cell per action: rows are the first two axes (brightness, contrast), columns the others (saturation, hue).
  function drawMap(now, retrieved) {
    const across = axes.slice(2).reduce((cells, axis) => cells * axis.count, 1), down = data.bank / across;
    const map = find(".map");
    const cell = Math.max(4, Math.round(700 / across));
    map.width = across * cell;
    map.height = down * cell;
    map.setAttribute("aria-label", `ranks of all ${data.bank} actions; ${words(now.at)} has ${ranks[now.view]}`);
    const context = map.getContext("2d");
    const box = (view, inset) => [
      (view % across) * cell + inset, Math.floor(view / across) * cell + inset, cell - 2 * inset, cell - 2 * inset];
    ranks.forEach((rank, view) => {
      context.fillStyle = colour(Math.log(rank) / Math.log(data.bank));
      context.fillRect(...box(view, 1));
    });
    for (const [view, role] of [[retrieved, "--retrieved"], [now.view, "--true"]]) {
      for (const [width, edge] of [[7, "--card"], [4, role]]) {
        context.lineWidth = width;
        context.strokeStyle = getComputedStyle(root).getPropertyValue(edge);
        context.strokeRect(...box(view, 0));
      }
    }
  }

  find(".scale").innerHTML = "<span>rank 1</span>" + Array.from({ length: 12 }, (_, i) =>
    `<i style="background:${colour(i / 11)}"></i>`).join("") + `<span>${data.bank}</span>`;
  find(".map").addEventListener("click", ({ offsetX, offsetY, target }) => {
    const across = axes.slice(2).reduce((cells, axis) => cells * axis.count, 1), down = data.bank / across;
    const column = Math.floor((offsetX / target.clientWidth) * across);
    const row = Math.floor((offsetY / target.clientHeight) * down);
    go(Math.min(Math.max(row, 0), down - 1) * across + Math.min(Math.max(column, 0), across - 1));
  });
  root.addEventListener("input", ({ target }) => {
    if (target.type === "radio") choose();
    else move();
    remember();
  });
  for (const button of root.querySelectorAll("button")) {
    button.addEventListener("click", () => go(buttons[button.value]()));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", move);
  Promise.all(photographs.map(({ picture }) => picture.decode())).then(() => {
    root.querySelectorAll(".photographs canvas").forEach((canvas, i) => show(canvas, photographs[i], data.bank));
    axes.forEach(({ name, count }, a) => {
      if (sliders.has(name)) sliders.get(name).value = a % 2 ? 1 : count - 1;
    });
    if (!restore(location.hash)) choose();
    addEventListener("hashchange", () => restore(location.hash));
  });
}

function share(value, low, high) {
  return high > low ? (value - low) / (high - low) : 0.5;
}

// Reversed viridis: yellow is near and dark blue far; brightness alone distinguishes them.
function colour(share) {
  const stops = [[253, 231, 37], [94, 201, 98], [33, 145, 140], [59, 82, 139], [68, 1, 84]];
  const at = Math.min(share, 0.9999) * (stops.length - 1), i = Math.floor(at);
  return `rgb(${stops[i].map((from, c) => Math.round(from + (at - i) * (stops[i + 1][c] - from))).join(",")})`;
}
