// What is drawn: a photograph in grey, the weights of one row over it, and what is said of them.
const dark = matchMedia('(prefers-color-scheme: dark)');
const SIZE = 448;

// Which output of (rows, columns, h, w) stands for a place, given by its shares of height and width; and its weights.
function rowOf(weights, place) {
  const [rows, columns, h, w] = weights.dims;
  const at = Math.floor(place[0] * rows) * columns + Math.floor(place[1] * columns);
  return weights.data.subarray(at * h * w, (at + 1) * h * w);
}

// How many positions are read, and how many equally weighted ones would be as spread out.
function summary(row) {
  let total = 0, read = 0, entropy = 0;
  for (const value of row) total += Math.abs(value);
  for (const value of row) {
    const share = Math.abs(value) / Math.max(total, 1e-30);
    if (share > 0) { read += 1; entropy -= share * Math.log(share); }
  }
  return `reads ${read} of ${row.length} positions, spread as over ${Math.exp(entropy).toFixed(1)}`;
}

// Colours fade into the background at zero, on a scale of square roots; two hues where weights are signed.
function colour(share, signed) {
  const palette = data.colours[dark.matches ? 'dark' : 'light'];
  const strength = Math.sqrt(Math.abs(share)), list = !signed ? palette.plain : share < 0 ? palette.below : palette.above;
  const [r, g, b] = list[Math.round(strength * (list.length - 1))];
  return `rgba(${r}, ${g}, ${b}, ${0.25 + 0.7 * strength})`;
}

// A frame around a patch, not over it.
function mark(pen, place, h, w) {
  const high = SIZE / h, wide = SIZE / w, gap = 3;
  const top = Math.floor(place[0] * h) * high - gap, left = Math.floor(place[1] * w) * wide - gap;
  for (const [style, width] of [['#fff', 6], ['#0b5fff', 3]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width;
    pen.strokeRect(left, top, wide + 2 * gap, high + 2 * gap);
  }
}

function drawPhoto(canvas, source, place, grid) {
  const pen = canvas.getContext('2d');
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(source, 0, 0, SIZE, SIZE);
  mark(pen, place, grid, grid);
}

// The photograph without colour, pale on white and dim on black, so that weights have the colours to themselves.
function greyed(source) {
  const canvas = new OffscreenCanvas(SIZE, SIZE), pen = canvas.getContext('2d');
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(source, 0, 0, SIZE, SIZE);
  const image = pen.getImageData(0, 0, SIZE, SIZE), p = image.data;
  const [base, span] = dark.matches ? [14, 0.4] : [158, 0.38];
  for (let i = 0; i < p.length; i += 4) p[i] = p[i + 1] = p[i + 2] = base + span * (p[i] + p[i + 1] + p[i + 2]) / 3;
  pen.putImageData(image, 0, 0);
  return canvas;
}

function drawRow(canvas, grey, row, signed, h, w, place) {
  const pen = canvas.getContext('2d');
  pen.drawImage(grey, 0, 0);
  let most = 0;
  for (const value of row) most = Math.max(most, Math.abs(value));
  for (let y = 0; y < h && most > 0; y += 1) {
    const top = Math.round(y * SIZE / h), bottom = Math.round((y + 1) * SIZE / h);
    for (let x = 0; x < w; x += 1) {
      const value = row[y * w + x];
      if (value === 0) continue;
      const left = Math.round(x * SIZE / w), right = Math.round((x + 1) * SIZE / w);
      pen.fillStyle = colour(value / most, signed);
      pen.fillRect(left, top, right - left, bottom - top);
    }
  }
  mark(pen, place, h, w);
}

// The middle square of a picture, as large as anything here asks for.
function squared(image) {
  const width = image.naturalWidth || image.width, height = image.naturalHeight || image.height;
  const side = Math.min(width, height), size = Math.min(Math.max(side, SIZE), 2 * SIZE);
  const canvas = new OffscreenCanvas(size, size), pen = canvas.getContext('2d');
  pen.fillStyle = '#fff';
  pen.fillRect(0, 0, size, size);
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(image, (width - side) / 2, (height - side) / 2, side, side, 0, 0, size, size);
  return canvas;
}

// A photograph as numbers from 0 to 1: (3, height, width).
function pixels(source, height, width) {
  const canvas = new OffscreenCanvas(width, height), pen = canvas.getContext('2d', { willReadFrequently: true });
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(source, 0, 0, width, height);
  const given = pen.getImageData(0, 0, width, height).data, n = height * width, values = new Float32Array(3 * n);
  for (let i = 0; i < n; i += 1) for (let c = 0; c < 3; c += 1) values[c * n + i] = given[4 * i + c] / 255;
  return values;
}
