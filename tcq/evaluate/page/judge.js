const at = (id) => document.getElementById(id)
const buttons = [...document.querySelectorAll('[data-answer]')]
const keys = { y: 'same', n: 'different', q: 'stop' }
let number = 0

function say(text, failed = false) {
  at('status').textContent = text
  at('status').classList.toggle('error', failed)
}

async function ask(path, options) {
  const answer = await fetch(path, options)
  const content = await answer.json()
  if (!answer.ok) throw new Error(content.error)
  return content
}

function show(state) {
  if (state.result) {
    at('question').hidden = true
    at('progress').textContent = ''
    say('Done. Train with the settings of the last line.')
    at('result').textContent = state.result
    at('result').hidden = false
    at('result').focus()
    return
  }
  if (state.number === number) return
  number = state.number
  for (const [i, id] of ['first', 'second'].entries()) {
    at(id).src = `api/pictures/${number}/${id}`
    at(id).nextElementSibling.textContent = state.names[i]
  }
  at('progress').textContent = `question ${number}`
  at('question').hidden = false
  say('')
  for (const button of buttons) button.disabled = false
}

async function answer(text) {
  if (at('question').hidden || buttons[0].disabled) return
  for (const button of buttons) button.disabled = true
  const options = { method: 'POST', body: JSON.stringify({ answer: text }) }
  await follow(() => ask(`api/answers/${number}`, options))
}

async function follow(first) {
  let next = first
  try {
    let state = await next()
    while (!state.result && state.number === number) state = await ask(`api/question?after=${number}`)
    show(state)
  } catch (error) {
    say(`No answer from tcq judge (${error.message}). Is it still running? Answers so far are kept.`, true)
    for (const button of buttons) button.disabled = false
  }
}

for (const button of buttons) button.addEventListener('click', () => answer(button.dataset.answer))
document.addEventListener('keydown', (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return
  if (keys[event.key]) answer(keys[event.key])
})
follow(() => ask('api/question?after=0'))
