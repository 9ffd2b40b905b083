const at = (id) => document.getElementById(id)
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

const others = () => [...at('others').querySelectorAll('button')]
const picked = () => others().flatMap((button, i) => (button.ariaPressed === 'true' ? [i + 1] : []))

function enable(on) {
  for (const button of [...others(), at('next'), at('stop')]) button.disabled = !on
}

function toggle(button) {
  button.ariaPressed = button.ariaPressed === 'true' ? 'false' : 'true'
  const count = picked().length
  at('next').firstChild.textContent = ['None of them ', 'This one '][count] ?? `These ${count} `
}

function other(name, place) {
  const [item, button, image, caption, key] = ['li', 'button', 'img', 'span', 'kbd'].map((tag) => document.createElement(tag))
  button.type = 'button'
  button.ariaPressed = 'false'
  button.ariaKeyShortcuts = key.textContent = place
  image.src = `api/pictures/${number}/${place}`
  image.alt = `Image ${place}`
  caption.textContent = name
  button.append(image, key, caption)
  button.addEventListener('click', () => toggle(button))
  item.append(button)
  return item
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
  at('anchor').firstChild.src = `api/pictures/${number}/0`
  at('anchor').lastChild.textContent = state.names[0]
  at('others').replaceChildren(...state.names.slice(1).map((name, i) => other(name, i + 1)))
  at('next').firstChild.textContent = 'None of them '
  at('progress').textContent = `question ${state.so_far + 1}`
  at('question').hidden = false
  say('')
  enable(true)
}

async function answer(value) {
  if (at('question').hidden || at('next').disabled) return
  enable(false)
  const options = { method: 'POST', body: JSON.stringify({ answer: value }) }
  await follow(() => ask(`api/answers/${number}`, options))
}

async function follow(first) {
  let next = first
  try {
    let state = await next()
    while (!state.result && (!state.names.length || state.number === number)) state = await ask(`api/question?after=${number}`)
    show(state)
  } catch (error) {
    say(`No answer from tcq judge (${error.message}). Is it still running? Answers so far are kept.`, true)
    enable(true)
  }
}

at('next').addEventListener('click', () => answer(picked()))
at('stop').addEventListener('click', () => answer('stop'))
document.addEventListener('keydown', (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return
  if (event.key === 'n') answer(picked())
  else if (event.key === 'q') answer('stop')
  else others()[event.key - 1]?.click()
})
follow(() => ask('api/question?after=0'))
