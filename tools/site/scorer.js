// Sphinx's weights of search results, but lessons come before the names of the API.
var Scorer = {
  objNameMatch: 5,
  objPartialMatch: 2,
  objPrio: { 0: 1, 1: 0, 2: -1 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
}
