document.querySelectorAll('th button').forEach(button => button.addEventListener('click', () => {
  const th = button.parentNode, at = [...th.parentNode.children].indexOf(th), body = th.closest('table').tBodies[0];
  const value = row => { const t = row.cells[at].dataset.sort ?? row.cells[at].textContent;
    return isNaN(parseFloat(t)) ? t : parseFloat(t); };
  const down = th.getAttribute('aria-sort') === 'ascending';
  [...th.parentNode.children].forEach(other => other.removeAttribute('aria-sort'));
  th.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  [...body.rows].sort((a, b) => { const x = value(a), y = value(b);
    const c = typeof x === typeof y ? (x > y) - (x < y) : typeof x === 'number' ? -1 : 1;
    return down ? -c : c; }).forEach(row => body.append(row));
}));
