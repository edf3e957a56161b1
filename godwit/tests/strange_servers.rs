//! Servers that are of the right authority and yet not what this program knows: what it says of them, and how it ends.

#![allow(clippy::unwrap_used)] // a test fails by panicking, its helpers too

use std::{convert::Infallible, path::PathBuf, process::Command, sync::Arc, time::SystemTime};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use identity::{ApiToken, ClusterAuthority, NodeIdentity, NodeKey, tls};
use tokio::{net::TcpListener, runtime::Runtime};

const HANDSHAKE_MAX: std::time::Duration = std::time::Duration::from_secs(10);

/// What a server answers to everything.
#[derive(Clone, Copy)]
struct Answer {
    status: u16,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
}

/// A server with one answer, and the files by which clients know it.
struct Server {
    runtime: Runtime,
    address: String,
    directory: tempfile::TempDir,
}

impl Server {
    fn start(answer: Answer, protocols: &'static [&'static [u8]]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = ClusterAuthority::create(
            &directory.path().join("ca"),
            uuid::Uuid::from_u128(7),
            SystemTime::now(),
        )
        .unwrap();
        let key = NodeKey::generate().unwrap();
        let names = ["127.0.0.1".to_owned()];
        let certificate = authority
            .issue_api(&key.request().unwrap(), &names, SystemTime::now())
            .unwrap();
        let identity = NodeIdentity::new(key, certificate.to_vec(), authority.certificate().clone()).unwrap();
        std::fs::write(directory.path().join("ca.pem"), authority.certificate().to_pem()).unwrap();
        ApiToken::generate()
            .unwrap()
            .create_file(&directory.path().join("token"))
            .unwrap();
        let mut config = tls::api_port(&identity).unwrap();
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();

        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        runtime.spawn(serve(listener, Arc::new(config), answer));
        Self {
            runtime,
            address,
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// How `godwit WORDS` ends with this server, and what it says.
    fn asked(self, words: &[&str]) -> (Option<i32>, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_godwit"))
            .env_clear()
            .args(["--server", &format!("https://{}", self.address), "--ca"])
            .arg(self.path("ca.pem"))
            .arg("--token-file")
            .arg(self.path("token"))
            .args(words)
            .output()
            .unwrap();
        self.runtime.shutdown_background();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }
}

async fn serve(listener: TcpListener, config: Arc<rustls::ServerConfig>, answer: Answer) {
    while let Ok((stream, _)) = listener.accept().await {
        let Ok(stream) = tls::accept(&config, stream, HANDSHAKE_MAX).await else {
            continue;
        };
        let service = service_fn(move |_: Request<Incoming>| async move {
            let mut response = Response::new(Full::new(Bytes::from_static(answer.body.as_bytes())));
            *response.status_mut() = StatusCode::from_u16(answer.status).unwrap();
            for (name, value) in answer.headers {
                response.headers_mut().insert(*name, value.parse().unwrap());
            }
            Ok::<_, Infallible>(response)
        });
        // The client leaves when it has its answer.
        let _ = http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }
}

#[test]
fn a_server_that_is_not_godwit_is_told_as_such() {
    let answer = Answer {
        status: 200,
        headers: &[],
        body: "<html>welcome</html>",
    };
    let (code, _, said) = Server::start(answer, &[b"h2"]).asked(&["vm", "list"]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("does not say that it is godwit"), "{said}");
}

#[test]
fn a_server_of_another_version_is_told_with_both_versions() {
    let answer = Answer {
        status: 404,
        headers: &[("godwit-version", "9.0.0")],
        body: "gone",
    };
    let (code, _, said) = Server::start(answer, &[b"h2"]).asked(&["vm", "list"]);
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains("9.0.0") && said.contains(env!("CARGO_PKG_VERSION")),
        "{said}"
    );
}

#[test]
fn what_a_newer_server_says_is_passed_on_to_programs_and_refused_to_people() {
    let answer = Answer {
        status: 200,
        headers: &[("godwit-version", "9.0.0")],
        body: r#"{"items":[{"name":"web1","mood":"\u001b[31mgood\u202e"}],"next":null}"#,
    };
    let (code, printed, said) = Server::start(answer, &[b"h2"]).asked(&["vm", "list", "-o", "json"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        printed.contains(r"\u001b[31mgood\u202e") && !printed.contains(['\u{1b}', '\u{202e}']),
        "{printed}"
    );
    let (code, _, said) = Server::start(answer, &[b"h2"]).asked(&["vm", "list"]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("-o json"), "{said}");
}

#[test]
fn a_refusal_with_a_code_and_escapes_of_its_own_is_still_one_safe_line() {
    let answer = Answer {
        status: 418,
        headers: &[
            ("content-type", "application/problem+json"),
            ("godwit-version", "9.0.0"),
        ],
        body: r#"{"status":418,"code":"teapot","detail":"short \u001b[2J and stout\nerror: fake","hint":"pour"}"#,
    };
    let (code, _, said) = Server::start(answer, &[b"h2"]).asked(&["vm", "start", "web1"]);
    assert_eq!(code, Some(1), "{said}");
    assert_eq!(
        said,
        "error: short \\u{1b}[2J and stout\\u{a}error: fake\n  next: pour\n"
    );
}

#[test]
fn a_server_that_does_not_speak_http2_is_no_server() {
    let answer = Answer {
        status: 200,
        headers: &[],
        body: "",
    };
    let (code, _, said) = Server::start(answer, &[b"http/0.9"]).asked(&["vm", "list"]);
    assert_eq!(code, Some(3), "{said}");
}

#[test]
fn a_migration_is_printed_with_its_receipt_for_people_and_programs() {
    // The form that a server answers with; the numbers are of no migration.
    let answer = Answer {
        status: 202,
        headers: &[("godwit-version", "0.1.0")],
        body: include_str!("samples/migration.json"),
    };
    let (code, printed, said) =
        Server::start(answer, &[b"h2"]).asked(&["op", "show", "0197b2a0-0000-7000-8000-000000000001"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(printed, include_str!("samples/migration.txt"));
    let (code, printed, _) = Server::start(answer, &[b"h2"]).asked(&["vm", "migrate", "web1", "--wait", "-o", "json"]);
    assert_eq!(code, Some(0));
    let operation: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(operation["kind"]["receipt"]["qemu_downtime_ms"], 12);
}
