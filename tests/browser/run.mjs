// node run.mjs URL CHROMIUM IMAGE...: what the page says of each image, as JSON.
// Without CHROMIUM ('') the npm package's; exit code 3 if no browser starts.
import { readFileSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import puppeteer from 'puppeteer-core'

const [url, chromium, ...images] = process.argv.slice(2)

async function unpacked() {
  process.env.AWS_EXECUTION_ENV = 'AWS_Lambda_nodejs20.x' // else it leaves out its libraries
  const path = await (await import('@sparticuz/chromium')).default.executablePath()
  const fonts = join(tmpdir(), 'fonts') // without any, drawing text ends the page
  const config = join(fonts, 'fonts.conf')
  writeFileSync(config, readFileSync(config, 'utf8').replaceAll('/tmp/fonts', fonts))
  return path
}

const browser = await (async () => puppeteer.launch({
  executablePath: chromium || await unpacked(),
  headless: 'shell',
  pipe: true, // ends with this process, however that ends
  args: ['--no-sandbox', '--disable-dev-shm-usage'],
}))().catch(error => {
  console.error(`no Chromium: ${error.message}`)
  process.exit(3)
})

const page = await browser.newPage()
page.setDefaultTimeout(30_000)
page.on('console', message => console.error(message.text()))
page.on('pageerror', error => console.error(error.message))
await page.goto(url)
await page.waitForFunction(() => document.querySelector('#file').onchange)
const texts = []
for (const image of images) {
  await page.$eval('#top5', element => { element.textContent = '' })
  await (await page.$('#file')).uploadFile(image)
  await page.waitForFunction(() => document.querySelector('#top5').textContent)
  texts.push(await page.$eval('#top5', element => element.textContent))
}
console.log(JSON.stringify(texts))
await browser.close()
