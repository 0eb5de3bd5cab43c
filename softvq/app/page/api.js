// How the page asks its server: one request of a kind at a time, sentences for errors, a sign that something is going on.

const running = new Map();
let busy = 0;

export function tell(sentence) {
  const box = document.getElementById("message");
  box.querySelector("p").textContent = sentence;
  box.hidden = !sentence;
}

function mark(change) {
  busy += change;
  document.body.classList.toggle("busy", busy > 0);
}

async function sentenceOf(response) {
  try {
    return (await response.json()).error || `The app answered ${response.status}.`;
  } catch {
    return `The app answered ${response.status}.`;
  }
}

export function cancel(kind) {
  running.get(kind)?.abort();
  running.delete(kind);
}

// Calls use(response) unless a newer request of this kind came in between; returns whether it was used.
async function request(kind, path, options, use) {
  cancel(kind);
  const controller = new AbortController();
  running.set(kind, controller);
  mark(1);
  try {
    const response = await fetch(path, { ...options, signal: controller.signal });
    if (!response.ok) throw new Error(await sentenceOf(response));
    await use(response, () => running.get(kind) === controller);
    return true;
  } catch (error) {
    if (controller.signal.aborted) return false;
    const lost = error instanceof TypeError;
    tell(lost ? "The app does not answer; is it still running? Reload the page once it is." : error.message);
    return false;
  } finally {
    mark(-1);
    if (running.get(kind) === controller) running.delete(kind);
  }
}

// The JSON that a path answers, or null if it was refused or a newer request of the same kind was made.
export async function ask(kind, path, query = {}, options = {}) {
  let found = null;
  const address = `${path}?${new URLSearchParams(query)}`;
  await request(kind, address, options, async (response, current) => {
    const data = await response.json();
    if (current()) {
      found = data;
      tell("");
    }
  });
  return found;
}

export function post(kind, path, value, query = {}) {
  const body = value instanceof Blob ? value : JSON.stringify(value);
  return ask(kind, path, query, { method: "POST", body });
}

// Calls each(event) for every server-sent event; returns whether the stream came to its end.
export function stream(kind, path, query, each) {
  return request(kind, `${path}?${new URLSearchParams(query)}`, {}, async (response, current) => {
    tell("");
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = JSON.parse(event.slice("data: ".length));
        if (data.error) throw new Error(data.error);
        if (current()) each(data);
      }
    }
  });
}
