// The list of pages is scrolled to the page that is open.
const list = document.querySelector('.sidebar-scroll')
const current = list?.querySelector('.current-page')
if (current) {
  const below = current.getBoundingClientRect().top - list.getBoundingClientRect().top
  list.scrollTop += below - list.clientHeight / 2
}

// Code and tables wider than the screen can be scrolled by the keyboard.
for (const box of document.querySelectorAll('pre, .table-wrapper, .text_html')) {
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
}
