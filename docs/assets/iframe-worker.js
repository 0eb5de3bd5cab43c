// Browsers refuse workers to pages that were opened from the disk, so there the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.onmessage = null
      const address = JSON.stringify(new URL(url, document.baseURI).href).replace(/</g, "\\u003c")
      window.addEventListener("message", (event) => this.received(event))
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc =
        "<script>self.postMessage = (data) => parent.postMessage({ fromWorker: data }, '*')</" + "script>" +
        "<script src=" + address.replace(/&/g, "&amp;") + "></" + "script>"
      this.frame.addEventListener("load", () => {
        for (const data of this.waiting.splice(0)) this.send(data)
        this.waiting = null
      })
      document.documentElement.append(this.frame)
    }

    received(event) {
      if (event.source !== this.frame.contentWindow || !event.data || !("fromWorker" in event.data)) return
      const message = new MessageEvent("message", { data: event.data.fromWorker })
      this.dispatchEvent(message)
      if (this.onmessage) this.onmessage(message)
    }

    send(data) {
      const message = new MessageEvent("message", { data })
      this.frame.contentWindow.dispatchEvent(message)
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.send(data)
    }

    terminate() {
      this.frame.remove()
    }
  }
}
