//! A real controller behind the real router, without sockets.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::{Arc, LazyLock};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, Response, StatusCode, header},
};
use controller::{Config, Controller, DefaultNetwork, Handle, Memory, StateDir, Storage};
use http_body_util::BodyExt as _;
use serde_json::Value;
use tower::ServiceExt as _;

/// The interface over a controller in a directory.
pub(crate) struct Api {
    pub(crate) router: Router,
    pub(crate) token: String,
    pub(crate) handle: Handle,
    controller: Controller,
    state: tempfile::TempDir,
}

impl Api {
    pub(crate) async fn start() -> Self {
        Self::over(Arc::new(Memory::default()), tempfile::tempdir().unwrap()).await
    }

    /// Over what is stored already.
    pub(crate) async fn over(storage: Arc<dyn Storage>, state: tempfile::TempDir) -> Self {
        let config = Config {
            state: state.path().join("state"),
            api_listen: "127.0.0.1:0".parse().unwrap(),
            agents_listen: "127.0.0.1:0".parse().unwrap(),
            names: vec!["controller.example".to_owned()],
            network: DefaultNetwork {
                address: "10.91.0.0".parse().unwrap(),
                prefix: 24,
                gateway: None,
                first: "10.91.0.10".parse().unwrap(),
                last: "10.91.0.20".parse().unwrap(),
            },
            telemetry_bytes_max: Config::TELEMETRY_BYTES,
        };
        let names = config.names.clone();
        let token = StateDir::new(&config.state).admin_token();
        let (controller, handle) = Controller::start_with(config, storage).await.unwrap();
        Self {
            router: rest::router(handle.clone(), &names),
            handle,
            token: std::fs::read_to_string(token).unwrap().trim().to_owned(),
            controller,
            state,
        }
    }

    /// Stops the controller; its directory stays.
    pub(crate) async fn stop(self) -> tempfile::TempDir {
        self.controller.stop().await;
        self.state
    }

    pub(crate) fn request(&self, method: &str, path: &str) -> axum::http::request::Builder {
        Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "controller.example:7443")
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Response<Body> {
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub(crate) async fn answer(&self, request: Request<Body>) -> (StatusCode, HeaderMap, Value) {
        let response = self.send(request).await;
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let value = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes).unwrap()
        };
        (status, headers, value)
    }

    pub(crate) async fn get(&self, path: &str) -> (StatusCode, Value) {
        let (status, _, value) = self
            .answer(self.request("GET", path).body(Body::empty()).unwrap())
            .await;
        (status, value)
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<Body>) -> (StatusCode, Value) {
        let request = self
            .request("POST", path)
            .header(header::CONTENT_TYPE, "application/json");
        let (status, _, value) = self.answer(request.body(body.into()).unwrap()).await;
        (status, value)
    }

    /// Sends what must be refused; checks that the refusal is a problem, and gives its code.
    pub(crate) async fn refused(&self, what: &str, request: Request<Body>, status: u16) -> String {
        let (given, headers, problem) = self.answer(request).await;
        assert_eq!(given.as_u16(), status, "{what}: {problem}");
        assert_eq!(headers[header::CONTENT_TYPE], "application/problem+json", "{what}");
        assert_eq!(problem["status"], status, "{what}");
        assert!(!problem["detail"].as_str().unwrap().is_empty(), "{what}");
        assert!(headers.contains_key(rest::VERSION_HEADER), "{what}");
        problem["code"].as_str().unwrap().to_owned()
    }
}

pub(crate) fn document() -> &'static Value {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(|| serde_json::from_str(rest::openapi_json()).unwrap());
    &DOCUMENT
}

/// Every endpoint of the document: method and path, with something in place of its parameters.
pub(crate) fn endpoints() -> Vec<(Method, String)> {
    let mut all = Vec::new();
    for (path, methods) in document()["paths"].as_object().unwrap() {
        let mut filled = path.clone();
        while let (Some(from), Some(to)) = (filled.find('{'), filled.find('}')) {
            let value = match &filled[from..=to] {
                "{sha256}" => "0".repeat(64),
                _ => "0197b2a0-0000-7000-8000-000000000000".to_owned(),
            };
            filled.replace_range(from..=to, &value);
        }
        for method in methods.as_object().unwrap().keys() {
            if let Ok(method) = method.to_ascii_uppercase().parse::<Method>() {
                all.push((method, filled.clone()));
            }
        }
    }
    assert!(all.len() > 30, "{all:?}");
    all
}
