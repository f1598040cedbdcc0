"""The chat page in a real browser, against a server with a scripted model (see chat_server.py).

The browser is Debian's Chromium (apt-get install chromium), driven by Playwright; where there is none, all of this is
skipped. One browser serves all tests; each has a context, that is a storage, of its own.
"""

import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from chat_server import ChatServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no chromium is here: the page is not tested (apt-get install chromium)", allow_module_level=True)

from playwright.sync_api import Browser, BrowserContext, Locator, Page, Playwright, expect, sync_playwright  # noqa: E402

TIMEOUT = 10_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright: Playwright
    with sync_playwright() as playwright:
        expect.set_options(timeout=TIMEOUT)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


@pytest.fixture
def context(browser: Browser, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    """A storage of its own; a test that is parametrized with it indirectly says what kind of screen it has."""
    context = browser.new_context(**getattr(request, "param", {}))
    context.set_default_timeout(TIMEOUT)
    problems: list[str] = []
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
    yield context
    context.close()
    assert not problems


@pytest.fixture
def page(context: BrowserContext, server: ChatServer) -> Page:
    return open_page(context, server)


def open_page(context: BrowserContext, server: ChatServer) -> Page:
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#input")).to_be_focused()
    return page


def send(page: Page, text: str) -> None:
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")


def say(page: Page, text: str) -> None:
    """Send a message and wait for the whole reply."""
    before = page.locator(".assistant").count()
    send(page, text)
    expect(page.locator(".assistant")).to_have_count(before + 1)
    expect(page.locator(".writing")).to_have_count(0)


def messages(page: Page) -> list[str]:
    """What stands in the conversation, users' and replies."""
    return page.locator(".message .body").all_text_contents()


def last(page: Page) -> Locator:
    return page.locator(".message").last


def test_sending_streams_a_reply(page, server):
    page.get_by_label("Your message").fill("slow hello there")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".writing .body")).to_have_text(re.compile("^You s"))
    seen = page.locator(".assistant .body").text_content()
    assert len(seen) < len("You said: slow hello there")
    expect(page.locator(".done .body")).to_have_text("You said: slow hello there")
    assert messages(page) == ["slow hello there", "You said: slow hello there"]
    expect(page.locator("#model")).to_have_text("test-sft")
    expect(page.locator("#input")).to_have_value("")


def test_the_whole_conversation_is_sent(page):
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    say(page, "a sum")
    say(page, "and more")
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "12+7"},
        {"type": "python_output", "text": "19"},
        {"type": "text", "text": "19, I think."},
    ]
    assert bodies[1]["messages"] == [
        {"role": "user", "content": "a sum"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "and more"},
    ]


def test_tool_calls_are_shown_inline(page):
    say(page, "a sum")
    expect(page.locator(".assistant .python")).to_have_text("12+7")
    expect(page.locator(".assistant .python_output")).to_have_text("19")
    assert messages(page)[1] == "It is 12+71919, I think."


def test_what_is_said_is_text_and_nothing_else(page):
    say(page, "<img src=x onerror=alert(1)><b>bold</b> world-free &amp;")
    assert page.locator("main img, main b").count() == 0
    assert messages(page)[0] == "<img src=x onerror=alert(1)><b>bold</b> world-free &amp;"


def test_characters_of_several_bytes(page):
    say(page, "slow world")
    assert messages(page)[1] == "안녕하세요 👋🏽, 세계! 🌍"


def test_events_are_put_together_however_the_network_cuts_them(page):
    """Events in pieces of seven bytes, some of which end within a character."""
    page.evaluate("""() => {
      const real = window.fetch;
      window.fetch = async (...args) => {
        const response = await real(...args);
        if (!String(args[0]).includes("completions")) return response;
        const bytes = new Uint8Array(await response.arrayBuffer());
        return new Response(new ReadableStream({ async start(controller) {
          for (let i = 0; i < bytes.length; i += 7) {
            controller.enqueue(bytes.slice(i, i + 7));
            await new Promise((resolve) => setTimeout(resolve, 0));
          }
          controller.close();
        } }));
      };
    }""")
    say(page, "hello world")
    assert messages(page)[1] == "안녕하세요 👋🏽, 세계! 🌍"


def test_stopping_keeps_what_there_is_and_frees_the_place(page, server):
    before = server.pool.stats()["cancelled"]
    send(page, "slow forever")
    expect(page.locator(".writing .body")).to_have_text(re.compile("on and"))
    page.get_by_role("button", name="Stop").click()
    expect(last(page)).to_contain_text("Stopped.")
    server.wait_until(lambda stats: stats["cancelled"] == before + 1 and not stats["in_flight"])
    kept = messages(page)[1]
    assert kept.startswith("on and")
    say(page, "hello")
    assert messages(page)[1:] == [kept, "hello", "You said: hello"]


def test_editing_a_message_replaces_what_followed(page):
    say(page, "one")
    say(page, "two")
    page.locator(".user").first.hover()
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    editor = page.get_by_label("Edit your message")
    expect(editor).to_be_focused()
    editor.press("Escape")
    assert messages(page) == ["one", "You said: one", "two", "You said: two"]
    expect(page.locator(".user").first.get_by_role("button", name="Edit")).to_be_focused()
    page.keyboard.press("Enter")
    editor.fill("three")
    editor.press("Enter")
    expect(page.locator(".done .body")).to_have_text(["You said: three"])
    assert messages(page) == ["three", "You said: three"]


def test_regenerating_replaces_the_last_reply(page):
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    say(page, "one")
    say(page, "two")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".done")).to_have_count(2)
    assert messages(page) == ["one", "You said: one", "two", "You said: two"]
    assert len(bodies) == 3 and bodies[1] == bodies[2]


def test_a_reload_keeps_the_conversation(page):
    say(page, "a sum")
    before = messages(page)
    page.reload()
    expect(page.locator(".message .body")).to_have_count(2)
    assert messages(page) == before
    say(page, "hello")
    assert messages(page) == [*before, "hello", "You said: hello"]


def test_a_reload_in_the_middle_of_a_reply(page, server):
    send(page, "slow forever")
    expect(page.locator(".writing .body")).to_have_text(re.compile("on and"))
    page.reload()
    expect(last(page)).to_contain_text(re.compile("The (reply was interrupted|connection was lost)"))
    assert messages(page)[1].startswith("on and")
    server.wait_until(lambda stats: not stats["in_flight"])
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".writing .body")).to_have_text(re.compile("on and"))
    page.keyboard.press("Escape")
    expect(last(page)).to_contain_text("Stopped.")


def test_two_tabs_have_conversations_of_their_own(page, context, server):
    say(page, "in the first")
    other = open_page(context, server)
    assert messages(other) == []
    say(other, "in the second")
    say(page, "again in the first")
    for tab in (page, other):
        tab.reload()
    expect(page.locator(".message")).to_have_count(4)
    expect(other.locator(".message")).to_have_count(2)
    assert messages(page)[::2] == ["in the first", "again in the first"]
    assert messages(other)[::2] == ["in the second"]


def test_a_duplicated_tab_goes_on_with_a_copy(page, context, server):
    say(page, "shared")
    with context.expect_page() as opened:  # a page that a page opens begins with a copy of its sessionStorage
        page.evaluate("window.open(location.href)")
    other = opened.value
    expect(other.locator(".message")).to_have_count(2)
    say(other, "in the copy")
    say(page, "in the original")
    for tab in (page, other):
        tab.reload()
        expect(tab.locator(".message")).to_have_count(4)
    assert messages(page)[::2] == ["shared", "in the original"]
    assert messages(other)[::2] == ["shared", "in the copy"]


def test_former_chats_are_listed_opened_and_deleted(page):
    say(page, "the first chat")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    say(page, "the second chat")
    page.get_by_role("button", name="Chats", exact=True).click()
    items = page.get_by_role("dialog").get_by_role("listitem")
    expect(items).to_have_count(2)
    expect(items.first).to_contain_text("the second chat")
    page.get_by_role("button", name="the first chat", exact=True).click()
    expect(page.locator(".user .body")).to_have_text(["the first chat"])
    page.get_by_role("button", name="Chats", exact=True).click()
    page.get_by_role("button", name="Delete the chat: the first chat").click()
    expect(items).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#welcome")).to_be_visible()


def stored_chats(page: Page) -> int:
    """How many chats the browser keeps."""
    return page.evaluate("Object.keys(localStorage).length")


def test_a_chat_deleted_while_its_reply_comes_stays_deleted(page, server):
    send(page, "slow forever")
    expect(page.locator(".writing .body")).to_have_text(re.compile("on and"))
    page.get_by_role("button", name="Chats", exact=True).click()
    page.get_by_role("button", name="Delete the chat: slow forever").click()
    expect(page.get_by_role("dialog")).to_contain_text("There are none yet.")
    page.keyboard.press("Escape")
    server.wait_until(lambda stats: not stats["in_flight"])
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    assert stored_chats(page) == 0


@pytest.mark.parametrize("text", ["hello", "slow forever"])
def test_a_chat_that_another_tab_deletes_stays_deleted(page, context, server, text):
    send(page, text)
    expect(last(page)).to_contain_text(re.compile("on and|You said"))
    other = open_page(context, server)
    other.get_by_role("button", name="Chats", exact=True).click()
    other.get_by_role("button", name=f"Delete the chat: {text}").click()
    page.wait_for_function("chat.isDeleted")
    page.close()
    assert stored_chats(other) == 0


def test_what_is_said_in_a_deleted_chat_is_kept_again(page, context, server):
    say(page, "hello")
    other = open_page(context, server)
    other.evaluate("key => localStorage.removeItem(key)", page.evaluate("PREFIX + chat.id"))
    page.wait_for_function("chat.isDeleted")
    say(page, "again")
    assert stored_chats(other) == 1


def test_a_browser_that_forbids_storage(context, server):
    for storage in ("localStorage", "sessionStorage"):
        denied = "() => { throw new DOMException('denied', 'SecurityError'); }"
        context.add_init_script(f"Object.defineProperty(window, '{storage}', {{ get: {denied} }});")
    page = open_page(context, server)
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#warning")).to_be_hidden()
    say(page, "hello")
    expect(page.locator("#warning")).to_contain_text("cannot keep the chat")
    page.get_by_role("button", name="Chats", exact=True).click()
    expect(page.get_by_role("dialog")).to_contain_text("There are none yet.")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    say(page, "hello again")
    assert messages(page) == ["hello again", "You said: hello again"]


def test_a_browser_that_is_full_says_so_until_it_is_not(page):
    page.evaluate(
        "try { for (let n = 1 << 20; n; ) { try { localStorage['x' + n + Math.random()] = 'x'.repeat(n); }"
        " catch { n >>= 1; } } } catch {}"
    )
    say(page, "hello")
    expect(page.locator("#warning")).to_be_visible()
    page.evaluate("localStorage.clear()")
    say(page, "again")
    expect(page.locator("#warning")).to_be_hidden()


def test_an_enter_that_ends_a_composition_sends_nothing(page):
    """Safari sends it after compositionend, with the key code 229."""
    page.locator("#input").fill("こん")
    press = "new KeyboardEvent('keydown', {{key: 'Enter', keyCode: {}, bubbles: true, cancelable: true}})"
    page.evaluate(f"document.querySelector('#input').dispatchEvent({press.format(229)})")
    assert messages(page) == []
    page.evaluate(f"document.querySelector('#input').dispatchEvent({press.format(13)})")
    expect(page.locator(".done .body")).to_have_text("You said: こん")


def test_a_new_chat_leaves_a_reply_that_is_under_way(page, server):
    send(page, "slow forever")
    expect(page.locator(".writing .body")).to_have_text(re.compile("on and"))
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    say(page, "hello")
    assert messages(page) == ["hello", "You said: hello"]
    server.wait_until(lambda stats: not stats["in_flight"])


def test_a_server_restarted_in_the_middle(context):
    first = ChatServer()
    page = open_page(context, first)
    say(page, "hello")
    send(page, "slow forever")
    expect(page.locator(".writing .body")).to_have_text(re.compile("on and"))
    first.stop()
    expect(last(page)).to_contain_text("The server is stopping.")
    page.get_by_role("button", name="Try again").click()
    expect(last(page)).to_contain_text("The server cannot be reached.")
    with ChatServer(port=first.port):
        page.get_by_role("button", name="Try again").click()
        expect(page.locator(".writing .body")).to_have_text(re.compile("on and"))
        page.keyboard.press("Escape")
        expect(last(page)).to_contain_text("Stopped.")
        assert messages(page)[:3] == ["hello", "You said: hello", "slow forever"]
        say(page, "and now?")
        assert messages(page)[-1] == "You said: and now?"


def test_a_connection_that_is_lost(page):
    """The stream ends as where a server is killed: without a word, and without the event that is the last."""
    page.evaluate("""() => {
      const real = window.fetch;
      window.fetch = async (...args) => {
        window.fetch = real;
        const text = await (await real(...args)).text();
        return new Response(new Blob([text.slice(0, text.indexOf("finish_reason\\": \\"stop"))]).stream());
      };
    }""")
    say(page, "hello")
    expect(last(page)).to_contain_text("The connection was lost.")
    assert messages(page)[1].startswith("You said")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".done .body")).to_have_text("You said: hello")


def test_errors_of_the_server_are_shown_and_left_out_of_what_follows(page):
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    say(page, "crash now")
    expect(last(page)).to_contain_text("The model failed.")
    say(page, "hello")
    assert bodies[1]["messages"] == [{"role": "user", "content": "hello"}]


def test_dropped_messages_are_told(context):
    with ChatServer(context_tokens=90) as server:
        page = open_page(context, server)
        say(page, "hello hello hello")
        assert page.get_by_text("left out").count() == 0
        say(page, "hello again, hello")
        expect(last(page)).to_contain_text("The 2 oldest messages no longer fit")
        assert messages(page)[-1] == "You said: hello again, hello"


def test_a_chat_longer_than_the_servers_limits_goes_on(context):
    with ChatServer(context_tokens=60_000) as server:
        page = open_page(context, server)
        for _ in range(4):
            say(page, "x" * 8000)
        expect(last(page)).to_contain_text("The 2 oldest messages no longer fit")
        assert messages(page)[-1].startswith("You said: xxx")


def test_the_keyboard_alone(page):
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    expect(page.locator(".done .body")).to_have_text("You said: line one\nline two")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("slow forever")
    page.keyboard.press("Enter")
    expect(page.locator(".writing .body")).to_have_text(re.compile("on and"))
    page.keyboard.type("the next one")  # can be written meanwhile; Enter does not stop the reply
    page.keyboard.press("Enter")
    expect(page.locator(".writing")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(last(page)).to_contain_text("Stopped.")
    expect(page.locator("#input")).to_have_value("the next one")
    for _ in range(2):  # backwards, past the conversation, to the button of the last reply
        page.keyboard.press("Shift+Tab")
        if page.get_by_role("button", name="Regenerate").evaluate("node => node === document.activeElement"):
            break
    expect(page.get_by_role("button", name="Regenerate")).to_be_focused()
    outline = page.get_by_role("button", name="Regenerate").evaluate("node => getComputedStyle(node).outlineStyle")
    assert outline == "solid"


def test_a_screen_reader_hears_a_reply_once(page):
    """Pieces of a reply are in no live region; the whole is put into one at the end."""
    send(page, "slow hello")
    expect(page.get_by_role("status")).to_have_text("nanochat is replying.")
    expect(page.locator(".writing .body")).to_have_text(re.compile("You s"))
    expect(page.get_by_role("status")).to_have_text("nanochat is replying.")
    expect(page.locator(".assistant")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("status")).to_have_text("You said: slow hello")
    expect(page.locator(".assistant")).to_have_attribute("aria-busy", "false")
    assert page.get_by_role("heading", name="You", exact=True).count() == 1
    assert page.get_by_role("main", name="Conversation").count() == 1
    live = page.locator("[aria-live], [role=log], [role=alert], [role=status]")
    assert live.evaluate_all("nodes => nodes.map((node) => node.id)") == ["warning", "status"]


@pytest.mark.parametrize(
    "context", [{"viewport": {"width": 320, "height": 600}, "has_touch": True, "color_scheme": "dark"}], indirect=True
)
def test_the_width_of_a_phone(page):
    def assert_fits() -> None:
        wide = page.evaluate("""() => [...document.querySelectorAll("body *")].filter((node) => {
          const box = node.getBoundingClientRect();
          return box.width > 1 && (box.left < -0.5 || box.right > innerWidth + 0.5);
        }).map((node) => node.outerHTML.slice(0, 80))""")
        assert wide == [] and page.evaluate("document.documentElement.scrollWidth") <= 320

    assert_fits()
    say(page, "a sum and a very " + "long" * 40 + " word")
    say(page, "hello " * 20)
    assert_fits()
    page.get_by_role("button", name="Edit").first.click()
    assert_fits()
    page.get_by_role("button", name="Chats", exact=True).click()
    assert_fits()
    page.get_by_role("button", name="Close").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 24, 22)"  # it is dark
    box = page.locator("#composer").bounding_box()
    assert box["y"] + box["height"] <= 600  # the place to write is in sight


def test_reading_back_is_not_disturbed_by_a_reply(page):
    page.set_viewport_size({"width": 600, "height": 400})
    for i in range(4):
        say(page, f"hello {i}")
    top = page.locator("#scroller").evaluate("node => node.scrollTop")
    assert top > 0  # the end is in sight after sending
    send(page, "slow " + "word " * 40)
    expect(page.locator(".writing .body")).to_have_text(re.compile("You s"))
    page.locator("#scroller").evaluate("node => { node.scrollTop = 0; }")
    time.sleep(0.5)
    assert page.locator("#scroller").evaluate("node => node.scrollTop") == 0
    page.keyboard.press("Escape")
