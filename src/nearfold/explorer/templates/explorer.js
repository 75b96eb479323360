// The page: its state, which is its link; what follows when it changes; keyboard and pointer.
const byId = id => document.getElementById(id);
const photo = byId('photo'), place = () => [(state.at[0] + 0.5) / data.grid, (state.at[1] + 0.5) / data.grid];
const choices = Object.keys(data.choices);
let state, source, grey, described, panels = [], question = 0, working = Promise.resolve();

// --- the state is the part of the address behind #
function fromLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  const one = (name, known, otherwise) => known.includes(given.get(name)) ? given.get(name) : otherwise;
  const numbers = (given.get('at') || '').split(',').map(Number);
  const inside = numbers.length === 2 && numbers.every(n => Number.isInteger(n) && n >= 0 && n < data.grid);
  const lambda = given.has('lambda') ? Number(given.get('lambda')) : NaN;
  const found = {
    photo: one('photo', data.photographs, data.photographs[0]),
    view: one('view', ['operators', ...data.networks], 'operators'),
    at: inside ? numbers : [...data.at],
    lambda: lambda >= 0 && lambda <= 1 ? lambda : data.lambda,
  };
  for (const name of choices) found[name] = Number(one(name, data.choices[name].map(String), data.start[name]));
  return found;
}

function link() {
  const said = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (name === 'photo' && value === '') continue;
    if (name === 'view' && value === 'opened') continue;
    said.set(name, Array.isArray(value) ? value.join(',') : value);
  }
  return '#' + said.toString().replaceAll('%2C', ',');
}

function say(text, wrong = false) {
  byId('status').textContent = text;
  byId('status').classList.toggle('wrong', wrong);
}

const notationOf = operator => operator.notation.replace('{lambda}', state.lambda)
  .replace(/\{(\w+)\}/g, (all, name) => state[name] ?? all);
const keyOf = operator => [operator.name, ...operator.hears.map(name => name + state[name])].join('-');

// --- panels: a picture and what is said about it
function panel(title, words, formula) {
  const figure = document.createElement('figure'), canvas = document.createElement('canvas');
  canvas.width = canvas.height = SIZE;
  canvas.setAttribute('role', 'img');
  const caption = document.createElement('figcaption');
  const add = (tag, kind, text) => {
    const made = document.createElement(tag);
    made.className = kind;
    made.textContent = text;
    caption.append(made);
    return made;
  };
  add('h2', '', title);
  const said = add('p', 'summary', '…');
  const notation = document.createElement('code');
  add('p', '', '').append(notation);
  if (words) add('p', '', words);
  if (formula) add('p', 'formula', formula);
  figure.append(canvas, caption);
  figure.classList.add('busy');
  canvas.addEventListener('click', event => asked(canvas, event));
  return { title, figure, canvas, said, notation, weights: null, signed: false, made: '' };
}

function take(one, weights, made) {
  Object.assign(one, { weights, made, signed: weights.data.some(value => value < 0) });
  show(one);
}

function show(one) {
  if (!one.weights) return;
  const [, , h, w] = one.weights.dims, row = rowOf(one.weights, place());
  drawRow(one.canvas, grey, row, one.signed, h, w, place());
  const text = summary(row);
  one.said.textContent = text;
  one.canvas.setAttribute('aria-label', `${one.title} ${text}. ${strongest(row, w)}`);
  one.figure.classList.remove('busy');
}

function strongest(row, w) {
  let best = 0;
  row.forEach((value, i) => { if (Math.abs(value) > Math.abs(row[best])) best = i; });
  return `The largest weight, ${row[best].toPrecision(3)}, is at row ${Math.floor(best / w) + 1}, column ${best % w + 1}.`;
}

function lay(made) {
  panels = made;
  byId('pictures').replaceChildren(...made.map(one => one.figure));
}

// --- what is computed. A newer question ends an older one
async function compute() {
  const mine = ++question;
  if (!ort || !source) return;
  try {
    if (state.view === 'operators') await computeOperators(mine);
    else await computeNetwork(mine);
    if (mine === question) say('');
  } catch (error) {
    if (mine === question) say(error.message, true);
  }
}

// Lets the page be drawn and asked between two operators.
const breathe = () => new Promise(next => setTimeout(next));

async function computeOperators(mine) {
  if (!described) {
    const values = tensor(pixels(source, data.side, data.side), [3, data.side, data.side]);
    described = (await run(await opened('features'), [values]))[0];
  }
  const x = described;
  for (const [i, operator] of data.operators.entries()) {
    const one = panels[i], key = keyOf(operator), wanted = operator.blends ? `${key} ${state.lambda}` : key;
    one.notation.textContent = notationOf(operator);
    if (one.made === wanted) continue;
    const graph = await opened(key);
    if (mine !== question) return;
    const inputs = operator.blends ? [x, tensor(Float32Array.of(state.lambda), [1])] : [x];
    const [weights] = await run(graph, inputs);
    if (mine !== question) return;
    take(one, weights, wanted);
    await breathe();
    if (mine !== question) return;
  }
  prepare(mine).catch(() => {}); // who asks for that graph is told
}

// The graphs that one step of a slider would ask for are opened while nobody asks for anything.
async function prepare(mine) {
  for (const step of [1, -1]) {
    for (const name of choices) {
      const near = data.choices[name][data.choices[name].indexOf(state[name]) + step];
      for (const operator of data.operators.filter(each => near && each.hears.includes(name))) {
        await breathe();
        if (mine !== question) return;
        const key = [operator.name, ...operator.hears.map(each => each + (each === name ? near : state[each]))].join('-');
        await opened(key);
      }
    }
  }
}

async function computeNetwork(mine) {
  if (panels.length && panels[0].made === state.view) return;
  const graph = await opened(state.view), shape = imageOf(graph);
  const found = await run(graph, [tensor(pixels(source, shape[1], shape[2]), shape)]);
  if (mine !== question) return;
  if (found.some(each => each.dims.length !== 4)) throw new Error(NO_LAYERS);
  lay(graph.outputNames.map(name => {
    const [title, ...notation] = name.split(': '), one = panel(title, '', '');
    one.notation.textContent = notation.join(': ');
    return one;
  }));
  found.forEach((weights, i) => take(panels[i], weights, state.view));
}

const NO_LAYERS = 'This ONNX file does not say what its layers read. One that does is written by ' +
  'nearfold.explorer.layers_to_onnx(network, "file.onnx"), or shown by: nearfold explore --model NETWORK';

function imageOf(graph) {
  const [input] = graph.inputMetadata;
  const fits = graph.inputMetadata.length === 1 && input.isTensor && input.type === 'float32' && input.shape.length === 3 &&
    input.shape[0] === 3 && input.shape.every(n => typeof n === 'number');
  if (!fits) throw new Error(NO_LAYERS);
  return input.shape;
}

// --- what a change of the state brings about
function settle(remember = true) {
  const operators = state.view === 'operators';
  byId('sliders').hidden = !operators;
  byId('view').value = state.view;
  byId('lambda').value = state.lambda;
  byId('lambda-said').textContent = state.lambda.toFixed(2);
  for (const name of choices) {
    byId(name).value = data.choices[name].indexOf(state[name]);
    byId(name).setAttribute('aria-valuetext', state[name]);
    byId(`${name}-said`).textContent = state[name];
  }
  byId('private').hidden = state.photo !== '';
  document.querySelectorAll('[data-photo]').forEach(button =>
    button.setAttribute('aria-pressed', button.dataset.photo === state.photo));
  byId('where').textContent = `Row ${state.at[0] + 1}, column ${state.at[1] + 1} of ${data.grid}.`;
  if (remember) history.replaceState(null, '', link());
  working = compute();
}

function move(row, column) {
  const clip = n => Math.min(Math.max(n, 0), data.grid - 1);
  state.at = [clip(row), clip(column)];
  drawPhoto(photo, source, place(), data.grid);
  panels.forEach(show);
  settle();
}

function asked(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const share = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
  if (source) move(...share.map(n => Math.floor(n * data.grid)));
}

function see(image) {
  source = squared(image);
  grey = greyed(source);
  described = null;
  panels.forEach(one => { one.made = ''; });
  drawPhoto(photo, source, place(), data.grid);
}

async function choose(name) {
  const button = document.querySelector(`[data-photo="${name}"]`), image = button.querySelector('img');
  await image.decode();
  state.photo = name;
  photo.setAttribute('aria-label', `${button.getAttribute('aria-label')}. Arrow keys move the position.`);
  see(image);
}

function view(name) {
  state.view = name;
  lay(name === 'operators' ? data.operators.map(each => panel(each.title, each.words, each.formula)) : []);
}

async function apply() {
  const old = state, next = fromLink();
  state = next;
  if (!old || old.view !== next.view) view(next.view);
  if (!old || old.photo !== next.photo) await choose(next.photo);
  drawPhoto(photo, source, place(), data.grid);
  panels.forEach(show);
  settle(false);
}

// --- pointer, keyboard, files
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
photo.addEventListener('click', event => asked(photo, event));
photo.addEventListener('keydown', event => {
  const step = STEPS[event.key];
  if (!step || !source || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  const far = event.shiftKey ? 5 : 1;
  move(state.at[0] + far * step[0], state.at[1] + far * step[1]);
});
byId('lambda').addEventListener('input', event => { state.lambda = Number(event.target.value); settle(); });
for (const name of choices) {
  byId(name).addEventListener('input', event => { state[name] = data.choices[name][Number(event.target.value)]; settle(); });
}
byId('view').addEventListener('change', event => { view(event.target.value); settle(); });
document.querySelectorAll('[data-photo]').forEach(button => button.addEventListener('click', async () => {
  await choose(button.dataset.photo);
  settle();
}));
byId('own').addEventListener('change', async event => {
  const [given] = event.target.files;
  event.target.value = '';
  if (!given) return;
  try {
    see(await createImageBitmap(given));
    state.photo = '';
    photo.setAttribute('aria-label', `Your photograph ${given.name}. Arrow keys move the position.`);
    settle();
  } catch {
    say(`${given.name} is no image that this browser can read.`, true);
  }
});
byId('model').addEventListener('change', async event => {
  const [given] = event.target.files;
  event.target.value = '';
  if (!given) return;
  try {
    const model = await session(new Uint8Array(await given.arrayBuffer()));
    imageOf(model);
    sessions.set('opened', Promise.resolve(model));
    if (!byId('view').querySelector('[value=opened]')) byId('view').append(new Option('', 'opened'));
    byId('view').querySelector('[value=opened]').textContent = `layers of ${given.name}`;
    view('opened');
    settle();
  } catch (error) {
    say(error.message === NO_LAYERS ? NO_LAYERS : `${given.name} cannot be read: ${error.message}`, true);
  }
});
byId('link').addEventListener('click', async () => {
  history.replaceState(null, '', link());
  try {
    await navigator.clipboard.writeText(location.href);
    say('The link is copied.');
  } catch {
    say('The link is the address of this page.');
  }
});
addEventListener('hashchange', apply);
dark.addEventListener('change', () => { if (source) { grey = greyed(source); panels.forEach(show); } });

// For tests, and for the curious at the console.
globalThis.explorer = {
  state: () => state,
  pixels: (height, width) => pixels(source, height, width),
  rows: () => Object.fromEntries(panels.map(one => [one.title, one.weights && [...rowOf(one.weights, place())]])),
  answered: () => working,
  settled: () => panels.length > 0 && panels.every(one => one.made) && byId('pictures').querySelector('.busy') === null,
};

say('Loading ONNX Runtime …');
const runtime = start();
await apply();
try {
  await runtime;
  say('');
  working = compute();
} catch (error) {
  say(error.message, true);
}
