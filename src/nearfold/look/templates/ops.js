const body = document.querySelector('tbody'), rows = [...body.rows], first = [...rows];
const search = document.getElementById('search'), family = document.getElementById('family');
const sort = document.getElementById('sort'), heads = [...document.querySelectorAll('thead th')];
document.querySelector('.tools').hidden = false;
const text = new Map(rows.map(row => [row, (row.textContent + ' ' + row.id + ' ' + row.dataset.more).toLowerCase()]));
function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  rows.forEach(row => {
    const there = words.every(word => text.get(row).includes(word)) && (!family.value || row.dataset.family === family.value);
    row.hidden = !there;
    count += there;
  });
  document.getElementById('count').textContent = count + ' of ' + rows.length;
  document.querySelector('.nothing').hidden = count > 0;
}
function listed() {
  first.forEach(row => body.append(row));
  heads.forEach(head => head.removeAttribute('aria-sort'));
}
function order(at, down) {
  const value = row => { const cell = row.cells[at + 1], given = cell.dataset.sort;
    return given === undefined ? cell.textContent.trim().toLowerCase() : parseFloat(given); };
  const place = row => first.indexOf(row);
  rows.sort((a, b) => { const x = value(a), y = value(b);
    const c = typeof x === 'number' && isNaN(x) ? (isNaN(y) ? 0 : 1) : typeof y === 'number' && isNaN(y) ? -1
      : ((x > y) - (x < y)) * (down ? -1 : 1);
    return c || place(a) - place(b); }).forEach(row => body.append(row));
  heads.forEach(head => head.removeAttribute('aria-sort'));
  heads[at + 1].setAttribute('aria-sort', down ? 'descending' : 'ascending');
  sort.value = at;
}
search.addEventListener('input', show);
family.addEventListener('change', show);
sort.addEventListener('change', () => sort.value === '' ? listed() : order(+sort.value, false));
heads.slice(1).forEach((head, at) => head.querySelector('button').addEventListener('click',
  () => order(at, head.getAttribute('aria-sort') === 'ascending')));
show();
