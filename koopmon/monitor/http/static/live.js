// Updates a page of the monitor. The server renders the page. After each event of the stream this script fetches the
// page again and replaces the parts that differ. Without the script the page is complete but static.

const main = document.querySelector("main");
const connection = document.getElementById("connection");
const news = document.getElementById("news");
const FALLBACK_MS = 15_000;
const PACE_MS = 1000; // minimum time between two fetches of the page
const words = {
  waiting: "connecting",
  live: "live",
  lost: "connection lost, trying again",
  ended: "the monitor has ended, or it cannot be reached",
  polling: "no stream, polling every 15 s",
};
const told = new Map(); // last state and decision of each run, announced or known from the start
let complete = false; // true once the stream has sent the runs that exist: further ones are new
let busy = false;
let again = false;
let fallback = 0;
let failures = 0; // of the stream, in a row
const ENDED_AFTER = 3;
let skew = 0; // monitor's clock minus the browser's

function show(state) {
  if (connection.dataset.state !== state) {
    connection.dataset.state = state;
    const run = new URLSearchParams(main.dataset.events?.split("?")[1]).get("run");
    const report = run ? `: koopmon report ${run} shows the record` : ": koopmon runs lists recorded runs";
    connection.textContent = words[state] + (state === "ended" ? report : "");
  }
}

async function refresh() {
  if (busy || document.hidden) {
    again = true;
    return;
  }
  busy = true;
  again = false;
  try {
    const answer = await fetch(location.href, { headers: { accept: "text/html" } });
    if (answer.ok) {
      skew = (Date.parse(answer.headers.get("date")) || Date.now()) - Date.now();
      replace(new DOMParser().parseFromString(await answer.text(), "text/html"));
    }
  } catch {
    show("lost");
  } finally {
    setTimeout(() => {
      busy = false;
      if (again) {
        refresh();
      }
    }, PACE_MS);
  }
}

function replace(fresh) {
  document.title = fresh.title;
  for (const part of main.querySelectorAll("[data-live]")) {
    const other = fresh.getElementById(part.id);
    const markup = other?.innerHTML;
    if (other && markup !== part.dataset.seen) {
      const focused = part.contains(document.activeElement) ? trace(part, document.activeElement) : null;
      const scrolled = [...part.querySelectorAll(".scroll")].map((box) => [box.id, box.scrollLeft, box.scrollTop]);
      keep(part, other);
      part.replaceChildren(...other.childNodes);
      part.dataset.seen = markup;
      for (const [id, left, top] of scrolled) {
        document.getElementById(id)?.scrollTo(left, top);
      }
      if (focused) {
        find(part, focused)?.focus({ preventScroll: true });
      }
    }
  }
  tick();
}

// Keep open details and chosen options.
function keep(part, other) {
  for (const open of part.querySelectorAll("details[open]")) {
    other.querySelector(`#${CSS.escape(open.id)}`)?.setAttribute("open", "");
  }
  for (const select of part.querySelectorAll("select")) {
    const twin = other.querySelector(`#${CSS.escape(select.id)}`);
    if (twin) {
      twin.value = select.value;
    }
  }
}

// Identify an element by its id or its address, else by its position.
function trace(part, element) {
  const same = [...part.querySelectorAll(element.localName)];
  return { name: element.localName, id: element.id, href: element.getAttribute("href"), index: same.indexOf(element) };
}

function find(part, { name, id, href, index }) {
  const all = [...part.querySelectorAll(name)];
  return all.find((each) => (id && each.id === id) || (href && each.getAttribute("href") === href)) ?? all[index];
}

// Announce new runs, decisions and changes of state to screen readers, but not every snapshot.
function speak({ run, state, last_decision: last }) {
  const now = `${state} ${last?.step} ${last?.reason}`;
  const before = told.get(run);
  told.set(run, now);
  if (before === undefined) {
    if (complete) {
      news.textContent = `${run} is ${state}.`;
    }
  } else if (before !== now) {
    const over = !before.startsWith(`${state} `);
    news.textContent = over ? `${run} is ${state}.` : `${run}, step ${last.step}: ${last.reason}`;
  }
}

function listen() {
  const source = new EventSource(main.dataset.events);
  show("waiting");
  source.addEventListener("open", () => {
    failures = 0;
    show("live");
  });
  source.addEventListener("run", (event) => {
    speak(JSON.parse(event.data));
    refresh();
  });
  source.addEventListener("complete", () => {
    complete = true;
  });
  source.addEventListener("error", () => {
    if (source.readyState !== EventSource.CLOSED) {
      failures += 1;
      show(failures < ENDED_AFTER ? "lost" : "ended"); // the browser goes on trying
    } else if (!fallback) {
      // The monitor refused the stream because too many are open. Poll, and try the stream again.
      show("polling");
      fallback = setTimeout(() => {
        fallback = 0;
        refresh();
        listen();
      }, FALLBACK_MS);
    }
  });
}

function tick() {
  for (const time of main.querySelectorAll("time")) {
    const text = ago((Date.now() + skew - Date.parse(time.dateTime)) / 1000);
    if (time.textContent !== text) {
      time.textContent = text;
    }
  }
}

function ago(seconds) {
  for (const [size, unit] of [[86_400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= size) {
      return `${Math.round(seconds / size)} ${unit} ago`;
    }
  }
  return seconds >= 2 ? `${Math.round(seconds)} s ago` : "now";
}

document.documentElement.classList.add("scripted");
for (const part of main.querySelectorAll("[data-live]")) {
  part.dataset.seen = part.innerHTML;
}
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && again) {
    refresh();
  }
});
main.addEventListener("change", (event) => {
  if (event.target.id === "show") {
    const address = new URL(location.href);
    address.searchParams.set("show", event.target.value);
    history.replaceState(null, "", address);
    refresh();
  }
});
setInterval(tick, 1000);
listen();
