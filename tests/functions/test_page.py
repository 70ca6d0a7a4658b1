"""A function's page in a real browser: it works, and is a stranger to the portal whose address it shares."""

from pathlib import Path

import pytest

from tests.firefox import firefox
from tests.stack import Customer

PAGE = """
def handler(event, context):
    script = "document.title = 'origin ' + window.origin"
    body = f"<title>Loading</title><script>{script}</script>"
    return {"statusCode": 200, "headers": {"content-type": "text/html"}, "body": body}
"""
# What a page of the portal's own origin could read.
READ = """
const done = arguments[arguments.length - 1];
const asked = fetch("/api/portal/session", {credentials: "include"});
asked.then(answer => done(`read ${answer.status}`), () => done("refused"));
"""
COOKIE = "try { return document.cookie } catch (error) { return error.name }"


@pytest.mark.usefixtures("functions")
async def test_a_page_has_an_origin_of_its_own(customer: Customer, tmp_path: Path) -> None:
    """Its scripts run, but can read nothing of the portal's and keep no cookie there."""
    made = await customer.create("/api/portal/functions", name="page", runtime="python3", source=PAGE, auth="public")
    base = f"http://127.0.0.1:{customer.stack.settings.http_port}"
    async with firefox(tmp_path / "profile") as browser:
        await browser.do("WebDriver:Navigate", url=f"{base}{made['path']}")
        assert (await browser.do("WebDriver:GetTitle"))["value"] == "origin null"
        assert (await browser.do("WebDriver:ExecuteAsyncScript", script=READ, args=[]))["value"] == "refused"
        assert (await browser.do("WebDriver:ExecuteScript", script=COOKIE, args=[]))["value"] == "SecurityError"
        # The same, asked from the portal's own address, is answered: it is the origin that makes the difference.
        await browser.do("WebDriver:Navigate", url=f"{base}/api/openapi")
        assert (await browser.do("WebDriver:ExecuteAsyncScript", script=READ, args=[]))["value"] == "read 401"
