// Values of charts on hover and by keyboard, and tables that are sorted by a column.
(() => {
  "use strict";

  // A chart is a slider over the horizontal positions at which any of its lines has a point.
  function addReadings(svg) {
    const lines = JSON.parse(svg.dataset.readings);
    const places = [...new Map(lines.flatMap((line) => line.points.map(([x, , text]) => [x, text]))).entries()];
    places.sort((one, other) => one[0] - other[0]);
    const words = places.map(([x, at]) => {
      const values = lines.flatMap((line) =>
        line.points.filter((point) => point[0] === x).map((point) => `${line.name}: ${point[3]}`));
      return [at, ...values];
    });
    const { width, height } = svg.viewBox.baseVal;
    const cursor = document.createElementNS(svg.namespaceURI, "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", 20);
    cursor.setAttribute("y2", height - 38);
    const box = document.createElement("div");
    box.className = "reading";
    box.setAttribute("aria-hidden", "true");
    box.hidden = true;
    svg.append(cursor);
    svg.parentElement.classList.add("readable");
    svg.after(box);

    let place = places.length - 1;
    const describe = () => {
      svg.setAttribute("aria-valuenow", place);
      svg.setAttribute("aria-valuetext", words[place].join(", "));
    };
    const show = (next) => {
      place = Math.min(Math.max(next, 0), places.length - 1);
      const x = places[place][0];
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      svg.classList.add("read");
      box.replaceChildren(...words[place].map((text) => {
        const line = document.createElement("div");
        line.textContent = text;
        return line;
      }));
      box.hidden = false;
      const share = x / width;
      box.style.left = `${share * 100}%`;
      box.style.transform = `translateX(${share > 0.5 ? "calc(-100% - 8px)" : "8px"})`;
      box.style.top = `${svg.getBoundingClientRect().top - svg.parentElement.getBoundingClientRect().top + 4}px`;
      describe();
    };
    const hide = () => {
      box.hidden = true;
      svg.classList.remove("read");
    };

    svg.setAttribute("role", "slider");
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("aria-valuemin", 0);
    svg.setAttribute("aria-valuemax", places.length - 1);
    describe();
    svg.addEventListener("pointermove", (event) => {
      const bounds = svg.getBoundingClientRect();
      const x = (event.clientX - bounds.left) / bounds.width * width;
      const distances = places.map(([at]) => Math.abs(at - x));
      show(distances.indexOf(Math.min(...distances)));
    });
    svg.addEventListener("pointerleave", () => document.activeElement === svg || hide());
    svg.addEventListener("focus", () => show(place));
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const page = Math.ceil(places.length / 10);
      const to = {
        ArrowLeft: place - 1, ArrowDown: place - 1, ArrowRight: place + 1, ArrowUp: place + 1,
        PageDown: place - page, PageUp: place + page, Home: 0, End: places.length - 1,
      }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  }

  // Numbers by value, texts by alphabet; cells without a value come last in both directions.
  function makeSortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    const value = (row, column) => row.cells[column].dataset.value;
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const numeric = [...body.rows].some((row) => value(row, column) !== undefined);
        const before = head.getAttribute("aria-sort");
        const falling = before === null ? numeric : before === "ascending";
        const sign = falling ? -1 : 1;
        const sorted = [...body.rows].sort((one, other) => {
          if (!numeric) {
            return sign * one.cells[column].textContent.localeCompare(
              other.cells[column].textContent, undefined, { numeric: true });
          }
          const [a, b] = [value(one, column), value(other, column)];
          if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
          return sign * (a - b);
        });
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        body.append(...sorted);
      });
    });
  }

  document.querySelectorAll("svg[data-readings]").forEach(addReadings);
  document.querySelectorAll("table.sortable").forEach(makeSortable);
})();
