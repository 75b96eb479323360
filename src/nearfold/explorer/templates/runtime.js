// ONNX Runtime Web and the graphs. The runtime lies beside the page or is fetched from the CDN; either way it must be the
// very files that the page was made for.
const data = JSON.parse(document.getElementById('data').textContent);
const graphs = new Map([...document.querySelectorAll('script[data-graph]')].map(script => [script.dataset.graph, script]));
const sessions = new Map();
let ort;

async function file(name) {
  const places = location.protocol === 'file:' ? [data.runtime.cdn] : [data.runtime.beside, data.runtime.cdn];
  for (const place of places) {
    try {
      const answer = await fetch(place + name, { integrity: data.runtime.files[name] });
      if (answer.ok) return await answer.arrayBuffer();
    } catch { /* not there, or another version: the next place */ }
  }
  throw new Error(`ONNX Runtime Web ${data.runtime.version} is neither beside the page nor to be had from ${data.runtime.cdn}. ` +
    'Without a network, start the page by: nearfold explore --runtime FOLDER');
}

async function start() {
  const [code, wasm] = await Promise.all(Object.keys(data.runtime.files).map(file));
  const url = URL.createObjectURL(new Blob([code], { type: 'text/javascript' }));
  ort = await import(url);
  URL.revokeObjectURL(url);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = wasm;
  ort.env.logLevel = 'error';
}

async function unpacked(name) {
  const raw = Uint8Array.from(atob(graphs.get(name).textContent), letter => letter.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// As they are: to optimise a graph takes longer than it gains, and the exporter has folded what is constant.
const session = bytes => ort.InferenceSession.create(bytes, { graphOptimizationLevel: 'disabled' });

function opened(name) {
  if (!sessions.has(name)) sessions.set(name, unpacked(name).then(session));
  return sessions.get(name);
}

// One after another: a session takes no second question before it has answered the first.
let last = Promise.resolve();
function run(asked, inputs) {
  const answer = last.then(async () => {
    const found = await asked.run(Object.fromEntries(asked.inputNames.map((name, i) => [name, inputs[i]])));
    return asked.outputNames.map(name => found[name]);
  });
  last = answer.catch(() => {});
  return answer;
}

const tensor = (values, shape) => new ort.Tensor('float32', values, shape);
