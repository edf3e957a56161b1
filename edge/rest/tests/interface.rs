//! The whole interface over a real controller: what is answered, what is refused, and how.

#![allow(clippy::unwrap_used)] // a test fails by panicking, its helpers too

mod support;

use axum::{
    body::Body,
    http::{Request, StatusCode, header},
};
use futures_util::StreamExt as _;
use http_body_util::BodyExt as _;
use serde_json::json;
use sha2::Digest as _;
use support::{Api, document, endpoints};
use tower::ServiceExt as _;

#[tokio::test]
async fn the_committed_document_is_the_one_that_is_served() {
    let committed = include_str!("../../../docs/openapi.json");
    let remake = "cargo run -p rest --example openapi > docs/openapi.json";
    assert!(
        committed == rest::openapi_json(),
        "docs/openapi.json is old; remake it: {remake}"
    );
    let api = Api::start().await;
    let (status, served) = api.get("/v1/openapi.json").await;
    assert_eq!((status, &served), (StatusCode::OK, document()));
}

#[tokio::test]
async fn nothing_is_answered_without_a_token_but_what_must_be() {
    let api = Api::start().await;
    let open = ["/v1/join", "/v1/login", "/healthz", "/v1/openapi.json"];
    for (method, path) in endpoints()
        .into_iter()
        .filter(|(_, path)| !open.contains(&path.as_str()))
    {
        for token in [None, Some("Bearer gw1_wrong"), Some("Basic YTpi"), Some("Bearer ")] {
            let request = Request::builder()
                .method(&method)
                .uri(&path)
                .header(header::HOST, "localhost");
            let request = match token {
                Some(token) => request.header(header::AUTHORIZATION, token),
                None => request,
            };
            let request = request
                .header(header::CONTENT_LENGTH, 0)
                .header("upgrade", "godwit-console")
                .body(Body::empty());
            let response = api.send(request.unwrap()).await;
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{method} {path}");
            assert!(response.headers().contains_key(header::WWW_AUTHENTICATE));
        }
    }
}

#[tokio::test]
async fn unknown_paths_and_methods_are_problems_too() {
    let api = Api::start().await;
    for path in [
        "/",
        "/v1",
        "/v2/vms",
        "/v1/vms/a/b/c",
        "/v1/vms/..%2f..%2fetc",
        "/V1/VMS",
    ] {
        let code = api
            .refused(
                path,
                api.request("GET", path).body(Body::empty()).unwrap(),
                if path.contains("..") { 400 } else { 404 },
            )
            .await;
        assert_eq!(
            code,
            if path.contains("..") {
                "invalid-input"
            } else {
                "not-found"
            }
        );
    }
    let request = api.request("PUT", "/v1/vms").body(Body::empty()).unwrap();
    let (status, headers, problem) = api.answer(request).await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(problem["code"], "invalid-input");
    let allowed = headers[header::ALLOW].to_str().unwrap();
    assert!(allowed.contains("GET") && allowed.contains("POST"), "{allowed}");
}

#[tokio::test]
async fn a_request_for_another_host_or_from_a_foreign_page_is_refused() {
    let api = Api::start().await;
    let request = |host: &str, origin: Option<&str>| {
        let mut request = Request::get("/v1/vms").header(header::HOST, host);
        request = request.header(header::AUTHORIZATION, format!("Bearer {}", api.token));
        if let Some(origin) = origin {
            request = request.header(header::ORIGIN, origin);
        }
        request.body(Body::empty()).unwrap()
    };
    for host in [
        "evil.example",
        "controller.example.evil.example",
        "controller.example@evil.example",
        "",
        "a b",
    ] {
        let (status, _, problem) = api.answer(request(host, None)).await;
        assert!(matches!(status.as_u16(), 400 | 421), "{host}: {problem}");
    }
    for origin in [
        "https://evil.example",
        "null",
        "http://controller.example:7443",
        "https://controller.example",
        "x",
    ] {
        assert_eq!(
            api.refused(origin, request("controller.example:7443", Some(origin)), 403)
                .await,
            "forbidden"
        );
    }
    for host in [
        "controller.example:7443",
        "CONTROLLER.example",
        "127.0.0.1:1",
        "[::1]:7443",
        "localhost",
    ] {
        assert_eq!(api.send(request(host, None)).await.status(), StatusCode::OK, "{host}");
    }
    let own = request("controller.example:7443", Some("https://controller.example:7443"));
    assert_eq!(api.send(own).await.status(), StatusCode::OK);
    let twice = api
        .request("POST", "/v1/vms")
        .header(header::CONTENT_LENGTH, 0)
        .header(header::TRANSFER_ENCODING, "chunked");
    assert_eq!(
        api.refused("two lengths", twice.body(Body::empty()).unwrap(), 411)
            .await,
        "invalid-input"
    );
    let hosts = api
        .request("GET", "/v1/vms")
        .header(header::HOST, "localhost")
        .body(Body::empty())
        .unwrap();
    assert_eq!(api.refused("two hosts", hosts, 400).await, "invalid-input");
    let none = Request::get("/v1/vms").body(Body::empty()).unwrap();
    assert_eq!(api.refused("no host", none, 400).await, "invalid-input");
}

#[tokio::test]
async fn bodies_that_are_not_exactly_what_is_asked_for_are_refused() {
    let api = Api::start().await;
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
    let long = format!(r#"{{"name":"{}","template":"t"}}"#, "x".repeat(300));
    let bodies = [
        "".to_owned(),
        "{".to_owned(),
        "[]".to_owned(),
        "null".to_owned(),
        "{} {}".to_owned(),
        deep.clone(),
        format!(r#"{{"name":"a","template":{deep}}}"#),
        long,
        r#"{"name":"a","name":"a","template":"t"}"#.to_owned(),
        r#"{"name":"a","template":"t","colour":1}"#.to_owned(),
        r#"{"name":"a","template":"t","vcpus":0}"#.to_owned(),
        r#"{"name":"a","template":"t","vcpus":-1}"#.to_owned(),
        r#"{"name":"a","template":"t","vcpus":1.5}"#.to_owned(),
        r#"{"name":"a","template":"t","vcpus":9223372036854775808}"#.to_owned(),
        r#"{"name":"a","template":"t","memory_mib":1e400}"#.to_owned(),
        r#"{"name":"a","template":"t","memory_mib":18446744073709551615}"#.to_owned(),
        r#"{"name":"","template":"t"}"#.to_owned(),
        r#"{"name":"a\u0000b","template":"t"}"#.to_owned(),
        r#"{"name":"a\nb","template":"t"}"#.to_owned(),
        r#"{"name":"../x","template":"t"}"#.to_owned(),
        r#"{"name":"a,b=c","template":"t"}"#.to_owned(),
        r#"{"name":"-drive","template":"t"}"#.to_owned(),
        r#"{"name":"\u202eabc","template":"t"}"#.to_owned(),
        r#"{"name":"\u001b[31m","template":"t"}"#.to_owned(),
        "{\"name\":\"\u{ff}\",\"template\":\"t\"}".to_owned(),
    ];
    for body in bodies {
        let request = api
            .request("POST", "/v1/vms")
            .header(header::CONTENT_TYPE, "application/json; charset=utf-8");
        let what: String = body.chars().take(80).collect();
        // A value that only the engine knows to be too much may be refused after the template was not found.
        let (status, _, problem) = api.answer(request.body(Body::from(body)).unwrap()).await;
        assert!(
            status == 400 || (status == 404 && what.contains("vcpus\":0")),
            "{what}: {status} {problem}"
        );
    }
    let nested = json!({ "name": "t", "content": { "boot": { "kind": "bios", "secret": 1 }, "disk": null, "memory_mib_min": 64 } });
    let (status, problem) = api.post("/v1/templates", nested.to_string()).await;
    assert_eq!(status, 400, "{problem}");
    assert!(
        problem["detail"].as_str().unwrap().contains("content.boot.secret"),
        "{problem}"
    );
    let twice = r#"{"name":"t","content":{"boot":{"kind":"bios"},"disk":null,"memory_mib_min":64,"x":{"y":1,"y":2}}}"#;
    let (status, problem) = api.post("/v1/templates", twice).await;
    assert_eq!(status, 400, "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("duplicate"), "{problem}");
}

#[tokio::test]
async fn a_body_too_long_or_not_announced_as_json_is_refused_unread() {
    let api = Api::start().await;
    let huge = api
        .request("POST", "/v1/vms")
        .header(header::CONTENT_TYPE, "application/json");
    let huge = huge
        .header(header::CONTENT_LENGTH, 10_000_000_000u64)
        .body(Body::empty())
        .unwrap();
    assert_eq!(api.refused("announced", huge, 413).await, "invalid-input");
    let endless = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b' '; 64 << 10]));
    let endless = api
        .request("POST", "/v1/vms")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from_stream(endless));
    assert_eq!(api.refused("endless", endless.unwrap(), 413).await, "invalid-input");
    for kind in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
    ] {
        let request = api
            .request("POST", "/v1/vms")
            .header(header::CONTENT_TYPE, kind)
            .body(Body::from("{}"))
            .unwrap();
        assert_eq!(api.refused(kind, request, 415).await, "invalid-input");
    }
}

#[tokio::test]
async fn queries_and_headers_that_say_nothing_known_are_refused() {
    let api = Api::start().await;
    for path in [
        "/v1/vms?colour=red",
        "/v1/vms?limit=0",
        "/v1/vms?limit=1001",
        "/v1/vms?limit=-1",
        "/v1/vms?limit=1&limit=2",
        "/v1/vms?after=forged",
        "/v1/vms?after=%00",
        "/v1/vms/web1?x=1",
        "/v1/vms/%2e%2e%2f",
        "/v1/vms/%ff",
        "/v1/vms/-drive",
        "/v1/operations/not-an-id",
        "/v1/operations/0197b2a0-0000-7000-8000-000000000000/wait?timeout_s=61",
        "/v1/events?after=-1",
        "/v1/events?follow=maybe",
    ] {
        let request = api.request("GET", path).body(Body::empty()).unwrap();
        assert_eq!(api.refused(path, request, 400).await, "invalid-input");
    }
    for (name, value) in [
        ("if-match", "7"),
        ("if-match", "W/\"7\""),
        ("if-match", "\"x\""),
        ("idempotency-key", ""),
        ("idempotency-key", "a b"),
        ("last-event-id", "x"),
    ] {
        let (method, path) = if name == "last-event-id" {
            ("GET", "/v1/events")
        } else {
            ("DELETE", "/v1/vms/web1")
        };
        let request = api
            .request(method, path)
            .header(name, value)
            .body(Body::empty())
            .unwrap();
        assert_eq!(api.refused(value, request, 400).await, "invalid-input");
    }
    let long = api
        .request("DELETE", "/v1/vms/web1")
        .header("idempotency-key", "k".repeat(256))
        .body(Body::empty())
        .unwrap();
    api.refused("long key", long, 400).await;
}

#[tokio::test]
async fn blobs_are_taken_whole_under_their_digest_and_nothing_else_is() {
    let api = Api::start().await;
    let bytes = b"kernel".repeat(1000);
    let hash: [u8; 32] = sha2::Sha256::digest(&bytes).into();
    let digest = model::Digest(hash).to_string();
    let path = format!("/v1/blobs/{digest}");
    let head = |size: usize| {
        api.request("HEAD", &format!("{path}?size_bytes={size}"))
            .body(Body::empty())
            .unwrap()
    };
    let put = |path: &str, length: Option<&str>, bytes: Vec<u8>| {
        let request = api.request("PUT", path);
        let request = match length {
            Some(length) => request.header(header::CONTENT_LENGTH, length),
            None => request,
        };
        request.body(Body::from(bytes)).unwrap()
    };
    assert_eq!(api.send(head(bytes.len())).await.status(), StatusCode::NOT_FOUND);
    api.refused("no length", put(&path, None, bytes.clone()), 411).await;
    api.refused(
        "no digest",
        put("/v1/blobs/..%2f..%2fx", Some("6000"), bytes.clone()),
        400,
    )
    .await;
    api.refused("too long", put(&path, Some("99999999999999"), Vec::new()), 413)
        .await;
    api.refused("empty", put(&path, Some("0"), Vec::new()), 400).await;
    api.refused("cut short", put(&path, Some("6000"), bytes[1..].to_vec()), 400)
        .await;
    api.refused("other bytes", put(&path, Some("6000"), vec![0; 6000]), 400)
        .await;
    assert_eq!(api.send(head(bytes.len())).await.status(), StatusCode::NOT_FOUND);
    for _ in 0..2 {
        assert_eq!(
            api.send(put(&path, Some("6000"), bytes.clone())).await.status(),
            StatusCode::NO_CONTENT
        );
    }
    assert_eq!(api.send(head(bytes.len())).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(api.send(head(bytes.len() + 1)).await.status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_join_token_is_not_made_by_a_request_that_asks_for_more_than_one_can_keep() {
    let api = Api::start().await;
    let post = |path: &str| {
        let request = api.request("POST", path);
        request.header(header::CONTENT_TYPE, "application/json")
    };
    let tokens = "/v1/hosts/tokens";
    for (what, request) in [
        ("a plan", post("/v1/hosts/tokens?dry_run=true")),
        ("a revision", post(tokens).header("if-match", "\"1\"")),
    ] {
        let request = request.body(Body::from("{}")).unwrap();
        assert_eq!(api.refused(what, request, 400).await, "invalid-input");
    }
    // As the command line asks. A token that is shown once cannot be shown again: the second is another.
    let keyed = || {
        post(tokens)
            .header("idempotency-key", "once")
            .body(Body::from("{}"))
            .unwrap()
    };
    let (first, second) = (api.answer(keyed()).await, api.answer(keyed()).await);
    assert_eq!((first.0, second.0), (StatusCode::OK, StatusCode::OK));
    assert_ne!(first.2["token"], second.2["token"]);
}

#[tokio::test]
async fn a_revision_is_compared_or_refused_but_never_ignored() {
    let api = Api::start().await;
    for (method, path, body) in [
        ("PATCH", "/v1/hosts/h1", "{\"schedulable\":false}"),
        ("DELETE", "/v1/hosts/h1", ""),
        ("DELETE", "/v1/templates/micro", ""),
        ("POST", "/v1/operations/00000000-0000-0000-0000-000000000001/cancel", ""),
    ] {
        let request = api.request(method, path).header("if-match", "\"1\"");
        let request = request.header(header::CONTENT_TYPE, "application/json");
        let request = request.body(Body::from(body)).unwrap();
        assert_eq!(api.refused(path, request, 400).await, "invalid-input");
    }
    let request = api.request("POST", "/v1/vms/web1/start").header("if-match", "\"1\"");
    let request = request.body(Body::empty()).unwrap();
    assert_eq!(api.refused("of a VM", request, 404).await, "not-found");
}

#[tokio::test]
async fn a_controller_that_has_ended_is_not_healthy() {
    let api = Api::start().await;
    let (router, token) = (api.router.clone(), api.token.clone());
    let _state = api.stop().await;
    let asked = Request::builder()
        .uri("/healthz")
        .header(header::HOST, "controller.example:7443")
        .header(header::AUTHORIZATION, format!("Bearer {token}"));
    let answer = router.oneshot(asked.body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(&body[..], b"{\"status\":\"stopped\"}");
}

#[tokio::test]
async fn the_interface_tells_of_itself_and_of_an_empty_cell() {
    let api = Api::start().await;
    assert_eq!(api.get("/healthz").await, (StatusCode::OK, json!({ "status": "ok" })));
    let metrics = api
        .send(api.request("GET", "/metrics").body(Body::empty()).unwrap())
        .await;
    let text = metrics.into_body().collect().await.unwrap().to_bytes();
    assert!(text.ends_with(b"# EOF\n"), "{text:?}");
    for list in ["vms", "hosts", "templates", "operations", "pools", "volumes"] {
        let (status, page) = api.get(&format!("/v1/{list}?limit=5")).await;
        assert_eq!(
            (status, page),
            (StatusCode::OK, json!({ "items": [], "next": null })),
            "{list}"
        );
    }
    let (_, networks) = api.get("/v1/networks").await;
    assert_eq!(networks["items"][0]["name"], "default");
    let (status, problem) = api.get("/v1/vms/web1").await;
    assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("not-found")));
}

#[tokio::test]
async fn a_host_joins_with_a_token_once_and_is_told_of_as_an_event() {
    let api = Api::start().await;
    let (_, token) = api.post("/v1/hosts/tokens", r#"{"ttl_s":60}"#).await;
    let key = identity::NodeKey::generate().unwrap();
    let csr_pem = identity::pem("CERTIFICATE REQUEST", &key.request().unwrap());
    // A newer host says more; that is no reason to refuse it.
    let join = json!({ "token": token["token"], "csr_pem": csr_pem, "name": "h1", "new": 1 }).to_string();
    let send = || {
        let request = Request::post("/v1/join")
            .header(header::HOST, "10.0.0.1")
            .header(header::CONTENT_TYPE, "application/json");
        request.body(Body::from(join.clone())).unwrap()
    };
    let mut told = api
        .send(api.request("GET", "/v1/events").body(Body::empty()).unwrap())
        .await
        .into_body()
        .into_data_stream();
    let (status, _, joined) = api.answer(send()).await;
    assert_eq!(status, StatusCode::OK, "{joined}");
    assert_eq!(api.refused("twice", send(), 401).await, "unauthenticated");

    let event = String::from_utf8(told.next().await.unwrap().unwrap().to_vec()).unwrap();
    assert!(
        event.contains("event: notice") && event.contains("host.joined") && event.contains("id: "),
        "{event}"
    );
    let past = api
        .send(
            api.request("GET", "/v1/events?follow=false&after=0")
                .body(Body::empty())
                .unwrap(),
        )
        .await;
    let past = past.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(String::from_utf8(past.to_vec()).unwrap(), event);
    let sequence: u64 = event
        .split("id: ")
        .nth(1)
        .unwrap()
        .split('\n')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let resumed = api
        .request("GET", "/v1/events?follow=false")
        .header("last-event-id", sequence)
        .body(Body::empty())
        .unwrap();
    assert!(
        api.send(resumed)
            .await
            .into_body()
            .collect()
            .await
            .unwrap()
            .to_bytes()
            .is_empty()
    );

    let (_, host) = api.get("/v1/hosts/h1").await;
    assert_eq!(host["id"], joined["host"]);
    let patch = api
        .request("PATCH", "/v1/hosts/h1")
        .header(header::CONTENT_TYPE, "application/json");
    let (status, _, host) = api
        .answer(patch.body(Body::from(r#"{"schedulable":false}"#)).unwrap())
        .await;
    assert_eq!((status, &host["spec"]["schedulable"]), (StatusCode::OK, &json!(false)));
}

#[tokio::test]
async fn slow_work_is_an_operation_and_the_same_key_is_the_same_work() {
    let api = Api::start().await;
    let (_, token) = api.post("/v1/hosts/tokens", "{}").await;
    let key = identity::NodeKey::generate().unwrap();
    let csr_pem = identity::pem("CERTIFICATE REQUEST", &key.request().unwrap());
    let join = json!({ "token": token["token"], "csr_pem": csr_pem, "name": "h1" });
    assert_eq!(api.post("/v1/join", join.to_string()).await.0, StatusCode::OK);

    let remove = |path: &str, key: &str| {
        api.request("DELETE", path)
            .header("idempotency-key", key)
            .body(Body::empty())
            .unwrap()
    };
    let (status, headers, operation) = api.answer(remove("/v1/hosts/h1", "k1")).await;
    assert!(status.is_success(), "{status} {operation}");
    let location = headers[header::LOCATION].to_str().unwrap().to_owned();
    assert_eq!(
        location,
        format!("/v1/operations/{}", operation["id"].as_str().unwrap())
    );
    let (_, _, again) = api.answer(remove("/v1/hosts/h1", "k1")).await;
    assert_eq!(again["id"], operation["id"]);
    assert_eq!(
        api.refused("the key for something else", remove("/v1/hosts/h2", "k1"), 422)
            .await,
        "key-reused"
    );

    let (status, waited) = api.get(&format!("{location}/wait?timeout_s=5")).await;
    assert_eq!(
        (status, &waited["state"]["state"]),
        (StatusCode::OK, &json!("succeeded")),
        "{waited}"
    );
    let (_, listed) = api.get("/v1/operations").await;
    assert_eq!(listed["items"][0]["id"], operation["id"]);
    let cancel = api
        .request("POST", &format!("{location}/cancel"))
        .body(Body::empty())
        .unwrap();
    assert_eq!(api.refused("over already", cancel, 409).await, "wrong-state");
}

#[tokio::test]
async fn a_console_is_refused_without_an_upgrade_and_without_a_vm() {
    let api = Api::start().await;
    let plain = api.request("GET", "/v1/vms/web1/console").body(Body::empty()).unwrap();
    assert_eq!(api.refused("no upgrade", plain, 426).await, "invalid-input");
    let upgrade = api
        .request("GET", "/v1/vms/web1/console")
        .header(header::CONNECTION, "Upgrade");
    let upgrade = upgrade
        .header(header::UPGRADE, rest::CONSOLE_PROTOCOL)
        .body(Body::empty())
        .unwrap();
    assert_eq!(api.refused("no VM", upgrade, 404).await, "not-found");
}
