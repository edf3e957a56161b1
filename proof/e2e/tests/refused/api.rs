//! The API: bodies, heads, lengths, keys, tags, cursors, paths.

use crate::{NOBODY, host};
use anyhow::{Context, Result, ensure};
use e2e::api::{Api, Reply};
use e2e::fixture::Shared;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

pub(crate) fn a_vm_that_cannot_be_is_refused_before_anything_is_done(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let before = shared.cluster.json(&["op", "list"])?;
    for name in [
        "",
        "../x",
        "a,b=c",
        "-drive",
        "a\0b",
        "a\nb",
        "\u{202e}abc",
        "\u{1b}[31m",
        "A",
        &"x".repeat(300),
        NOBODY,
    ] {
        let body = json!({ "name": name, "template": "micro" }).to_string();
        api.ask("POST", "/v1/vms", &[], &body)?
            .refused(400, "invalid-input")
            .with_context(|| format!("name {name:?}"))?;
    }
    for fields in [
        r#""vcpus":0"#,
        r#""vcpus":-1"#,
        r#""vcpus":9223372036854775808"#,
        r#""vcpus":1e400"#,
        r#""vcpus":1.5"#,
        r#""vcpus":"1""#,
        r#""memory_mib":0"#,
        r#""memory_mib":18446744073709551615"#,
        r#""memory_mib":18446744073709551616"#,
        r#""disk_bytes":1"#,
        r#""disk_bytes":67108865"#,
        r#""disk_bytes":18446744073709551615"#,
        r#""family":"isa""#,
        r#""network":"../default""#,
        r#""host":"-drive""#,
    ] {
        let body = format!(r#"{{"name":"never","template":"micro",{fields}}}"#);
        api.ask("POST", "/v1/vms", &[], &body)?
            .refused(400, "invalid-input")
            .with_context(|| fields.to_owned())?;
    }
    ensure!(
        shared.cluster.json(&["op", "list"])? == before,
        "a refused request began an operation"
    );
    ensure!(
        shared.cluster.json(&["vm", "list"])? == json!([]),
        "a refused request made a VM"
    );
    Ok(())
}

pub(crate) fn a_body_that_is_no_plain_json_of_a_vm_is_refused(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let deep = format!("{}1{}", "[".repeat(10_000), "]".repeat(10_000));
    for body in [
        "{",
        "null",
        "[]",
        "\u{1}",
        &deep,
        &format!(r#"{{"name":"never","template":"micro","vcpus":{deep}}}"#),
        r#"{"name":"never","name":"twice","template":"micro"}"#,
        r#"{"name":"never","template":"micro","frobnicate":1}"#,
        r#"{"name":"never","template":"micro"} {}"#,
    ] {
        api.ask("POST", "/v1/vms", &[], body)?
            .refused(400, "invalid-input")
            .with_context(|| body.chars().take(60).collect::<String>())?;
    }
    let form = "name=never&template=micro";
    let length = format!("Content-Length: {}", form.len());
    let text = [
        "POST /v1/vms HTTP/1.1",
        &host(&api),
        &api.bearer(),
        "Content-Type: application/x-www-form-urlencoded",
        &length,
    ];
    api.raw(format!("{}\r\n\r\n{form}", text.join("\r\n")).as_bytes())?
        .refused(415, "invalid-input")
        .map(drop)
}

pub(crate) fn a_body_that_is_too_long_is_refused_before_it_is_read(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let head = [
        "POST /v1/vms HTTP/1.1".to_owned(),
        host(&api),
        api.bearer(),
        "Content-Type: application/json".into(),
    ];
    let head = head.join("\r\n");
    let began = Instant::now();
    let announced = format!("{head}\r\nContent-Length: 10737418240\r\n\r\n{{");
    api.raw(announced.as_bytes())?.refused(413, "invalid-input")?;
    let endless = format!("{head}\r\nTransfer-Encoding: chunked\r\n\r\n10000\r\n{{");
    api.raw(endless.as_bytes())?.refused(411, "invalid-input")?;
    ensure!(
        began.elapsed() < Duration::from_secs(10),
        "it took {:?}",
        began.elapsed()
    );
    let blob = format!(
        "PUT /v1/blobs/{} HTTP/1.1\r\n{}\r\n{}\r\n",
        "0".repeat(64),
        host(&api),
        api.bearer()
    );
    api.raw(format!("{blob}Content-Length: 18446744073709551\r\n\r\n").as_bytes())?
        .refused(413, "invalid-input")?;
    api.raw(format!("{blob}\r\n").as_bytes())?
        .refused(411, "invalid-input")?;
    let wrong = api.raw(format!("{blob}Content-Length: 3\r\n\r\nabc").as_bytes())?;
    ensure!(
        wrong.status == 400,
        "bytes with another digest are answered with {}",
        wrong.status
    );
    let long = format!(
        "GET /v1/vms HTTP/1.1\r\n{}\r\nX: {}\r\n\r\n",
        host(&api),
        "x".repeat(100 << 10)
    );
    let reply = api.raw(long.as_bytes())?;
    ensure!(
        reply.status == 431,
        "a head of 100 KiB is answered with {}",
        reply.status
    );
    Ok(())
}

pub(crate) fn a_request_that_drips_is_cut_off(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let began = Instant::now();
    // Half a head, and then nothing more.
    let reply = api.raw(format!("GET /v1/vms HTTP/1.1\r\n{}\r\n", host(&api)).as_bytes());
    ensure!(
        began.elapsed() < Duration::from_secs(25),
        "half a request holds its connection for {:?}",
        began.elapsed()
    );
    let refused = reply.is_err() || reply.is_ok_and(|reply| reply.status == 408);
    ensure!(refused, "half a request is answered as a whole one");
    Ok(())
}

pub(crate) fn a_request_without_a_right_token_is_refused_and_not_told_why(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let ask = |lines: &[&str]| {
        let mut text = vec!["GET /v1/vms HTTP/1.1".to_owned(), host(&api)];
        text.extend(lines.iter().map(|line| (*line).to_owned()));
        api.raw(format!("{}\r\n\r\n", text.join("\r\n")).as_bytes())
    };
    let mut said = BTreeSet::new();
    for token in [
        "gw1_",
        &format!("gw1_{}", "A".repeat(43)),
        "x",
        &api.token()[..api.token().len() - 1],
    ] {
        said.insert(ask(&[&format!("Authorization: Bearer {token}")])?.refused(401, "unauthenticated")?);
    }
    ensure!(said.len() == 1, "wrong tokens are told apart: {said:?}");
    ask(&[])?.refused(401, "unauthenticated")?;
    ask(&[&api.bearer(), &api.bearer()])?.refused(401, "unauthenticated")?;
    ask(&[&format!("Authorization: Basic {}", api.token())])?.refused(401, "unauthenticated")?;
    ask(&[&format!("Cookie: token={}", api.token())])?.refused(401, "unauthenticated")?;
    let log = fs::read_to_string(shared.cluster.lab().logs().join("controller.log")).context("no log")?;
    ensure!(!log.contains(api.token()), "the token is in the controller's log");
    Ok(())
}

pub(crate) fn a_request_for_another_host_or_from_another_page_is_refused(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let ask = |lines: &[&str]| {
        let text = format!(
            "GET /v1/vms HTTP/1.1\r\n{}\r\n{}\r\n\r\n",
            lines.join("\r\n"),
            api.bearer()
        );
        api.raw(text.as_bytes())
    };
    ask(&["Host: evil.example"])?.refused(421, "invalid-input")?;
    ask(&["Host: localhost", "Host: localhost"])?.refused(400, "invalid-input")?;
    ask(&["Host: a@localhost"])?.refused(400, "invalid-input")?;
    ask(&["X: y"])?.refused(400, "invalid-input")?;
    for origin in ["https://evil.example", "null", "http://localhost"] {
        ask(&["Host: localhost", &format!("Origin: {origin}")])?.refused(403, "forbidden")?;
    }
    let own = ask(&["Host: localhost", "Origin: https://localhost"])?;
    ensure!(own.status == 200, "our own page is answered with {}", own.status);
    Ok(())
}

pub(crate) fn a_request_whose_length_is_ambiguous_is_refused(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    for lengths in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: +5",
        "Content-Length: 5, 6",
        "Transfer-Encoding: chunked, identity",
    ] {
        let head = [
            "POST /v1/vms HTTP/1.1",
            &host(&api),
            &api.bearer(),
            "Content-Type: application/json",
            lengths,
        ]
        .join("\r\n");
        // What a second reader would take for a second request.
        let smuggled = format!("0\r\n\r\nDELETE /v1/vms/{NOBODY} HTTP/1.1\r\n{}\r\n\r\n", host(&api));
        let reply = api
            .raw(format!("{head}\r\n\r\n{smuggled}").as_bytes())
            .with_context(|| lengths.to_owned())?;
        // hyper refuses what it cannot parse by a bare status.
        let typed = reply.refused(411, "invalid-input").is_ok();
        let bare = reply.status == 400 && reply.body.is_empty();
        let said = String::from_utf8_lossy(&reply.body);
        ensure!(typed || bare, "{lengths:?} is answered with {} {said}", reply.status);
    }
    Ok(())
}

pub(crate) fn a_key_used_again_is_the_same_request_or_refused(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let ask = |name: &str, key: &str| {
        let body = json!({ "name": name, "template": "micro", "memory_mib": 256, "start": false }).to_string();
        api.ask("POST", "/v1/vms", &[&format!("Idempotency-Key: {key}")], &body)
    };
    let first = ask("once", "key-1")?;
    let again = ask("once", "key-1")?;
    let id = |reply: &Reply| reply.json().map(|operation| operation["id"].clone());
    ensure!(
        id(&first)?.is_string() && id(&first)? == id(&again)?,
        "the same request is another operation"
    );
    ask("other", "key-1")?.refused(422, "key-reused")?;
    ask("other", &"k".repeat(300))?.refused(400, "invalid-input")?;
    ask("other", "a b")?.refused(400, "invalid-input")?;
    shared.ended(id(&first)?.as_str().context("no id")?, 60)?;
    // It is kept by the store, not by the process.
    shared.cluster.kill_controller()?;
    shared.cluster.start_controller()?;
    let api = Api::of(&shared.cluster)?;
    let body = json!({ "name": "once", "template": "micro", "memory_mib": 256, "start": false }).to_string();
    let later = api.ask("POST", "/v1/vms", &["Idempotency-Key: key-1"], &body)?;
    ensure!(
        id(&first)? == id(&later)?,
        "after a restart the same request is another: {:?}",
        later.json()?
    );
    let listed = shared.cluster.json(&["vm", "list"])?;
    ensure!(
        listed[0]["name"] == "once" && listed[1].is_null(),
        "there are other VMs: {listed}"
    );
    Ok(())
}

pub(crate) fn a_thing_that_changed_since_it_was_read_is_not_changed(shared: &mut Shared) -> Result<()> {
    let words = [
        "vm",
        "create",
        "tag",
        "--template",
        "micro",
        "--memory",
        "256M",
        "--no-start",
        "--wait",
    ];
    shared.cluster.json(&words)?;
    let api = Api::of(&shared.cluster)?;
    let tag = || -> Result<String> {
        let reply = api.ask("GET", "/v1/vms/tag", &[], "")?;
        reply.header("etag").map(str::to_owned).context("no ETag")
    };
    let old = tag()?;
    let begun = api
        .ask("POST", "/v1/vms/tag/start", &[&format!("If-Match: {old}")], "")?
        .json()?;
    shared.ended(begun["id"].as_str().context("no id")?, 60)?;
    ensure!(tag()? != old, "a VM that is to run has the tag of one that is not");
    let matches = format!("If-Match: {old}");
    api.ask("POST", "/v1/vms/tag/kill", &[&matches], "")?
        .refused(412, "stale")?;
    api.ask("DELETE", "/v1/vms/tag", &[&matches], "")?
        .refused(412, "stale")?;
    for forged in ["W/\"1\"", "\"x\"", "1", "\"1\", \"2\"", "\"99999999999999999999\""] {
        api.ask("DELETE", "/v1/vms/tag", &[&format!("If-Match: {forged}")], "")?
            .refused(400, "invalid-input")
            .with_context(|| forged.to_owned())?;
    }
    ensure!(
        shared.cluster.vm("tag")?.state == "active",
        "a refused request changed the VM"
    );
    Ok(())
}

pub(crate) fn a_forged_cursor_path_or_query_is_refused(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    let get = |path: &str| api.ask("GET", path, &[], "").with_context(|| path.to_owned());
    for path in [
        "/v1/vms?after=forged",
        "/v1/vms?after=%00",
        "/v1/vms?limit=0",
        "/v1/vms?limit=1001",
        "/v1/vms?limit=-1",
        "/v1/vms?limit=99999999999999999999",
        "/v1/vms?frobnicate=1",
        "/v1/events?after=x",
        "/v1/vms/%2e%2e%2f",
        "/v1/vms/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/vms/%ff",
        "/v1/vms/a%00b",
        "/v1/vms/%1b%5b31m",
        "/v1/templates/-drive",
        "/v1/operations/1",
        "/v1/operations/0197b2a0-0000-7000-8000-000000000000/wait?timeout_s=61",
    ] {
        get(path)?
            .refused(400, "invalid-input")
            .with_context(|| path.to_owned())?;
    }
    let past = get(&format!("/v1/vms?after={NOBODY}"))?;
    ensure!(
        past.status == 200,
        "a cursor past the end is answered with {}",
        past.status
    );
    api.ask("GET", "/v1/events", &["Last-Event-ID: forged"], "")?
        .refused(400, "invalid-input")?;
    let blob = api.ask("HEAD", "/v1/blobs/%2e%2e%2f%2e%2e%2fadmin.token?size_bytes=1", &[], "")?;
    ensure!(
        blob.status == 400,
        "a blob that is a path is answered with {}",
        blob.status
    );
    api.ask("PUT", "/v1/vms", &[], "")?
        .refused(405, "invalid-input")
        .map(drop)
}

pub(crate) fn what_is_not_there_is_not_found(shared: &mut Shared) -> Result<()> {
    let api = Api::of(&shared.cluster)?;
    for path in ["/v1/vms/nobody", "/v2/vms", "/", "/v1/../etc/passwd", "/v1//vms"] {
        api.ask("GET", path, &[], "")?
            .refused(404, "not-found")
            .with_context(|| path.to_owned())?;
    }
    for noun in ["vms", "hosts", "templates", "operations"] {
        api.ask("GET", &format!("/v1/{noun}/{NOBODY}"), &[], "")?
            .refused(404, "not-found")?;
    }
    for verb in ["start", "stop", "kill", "reboot", "pause", "resume", "migrate"] {
        api.ask("POST", &format!("/v1/vms/{NOBODY}/{verb}"), &[], "")?
            .refused(404, "not-found")?;
    }
    let join = json!({ "token": "gwj1.x", "csr_pem": "x", "name": "h9" }).to_string();
    let reply = api.ask("POST", "/v1/join", &[], &join)?;
    ensure!(
        matches!(reply.status, 400 | 401),
        "a forged join token is answered with {}",
        reply.status
    );
    reply
        .refused(reply.status, reply.json()?["code"].as_str().unwrap_or_default())
        .map(drop)
}
