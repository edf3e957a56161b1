//! The client of `/v1`: one HTTP/2 connection over TLS to a server whose authority is pinned, made anew when it breaks.

pub(crate) mod locate;
pub(crate) mod sse;
mod wire_http;

use std::{cell::RefCell, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, client::conn::http2::SendRequest, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;
use wire::Problem;

use crate::exit::{Exit, Failure, chain};
use locate::Server;

/// What requests carry.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Longest answer that is read whole, bytes: a page of a thousand VMs is about 3 MB.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Longest wait for the head of an answer, beyond what the request itself asks the server to wait.
const ANSWER_MAX: Duration = Duration::from_secs(90);

/// Items asked for at a time.
const PAGE_ITEMS: usize = 500;

/// What a server says of itself with an answer.
pub(crate) struct Greeting {
    /// Where it was asked.
    pub(crate) address: String,
    /// Its version.
    pub(crate) version: Option<String>,
    /// Its time, as in a `Date` header.
    pub(crate) date: Option<String>,
}

/// A connection to a server. For one task: requests may overlap, threads may not.
pub(crate) struct Client {
    server: Server,
    sender: RefCell<Option<SendRequest<Body>>>,
}

impl Client {
    /// A client of this server; it connects with the first request.
    pub(crate) fn new(server: Server) -> Self {
        Self {
            server,
            sender: RefCell::new(None),
        }
    }

    /// The server.
    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// Asks for as little as needs a token.
    pub(crate) async fn greeting(&self) -> Result<Greeting, Failure> {
        let request = self.request(Method::GET, "/v1/hosts?limit=1");
        let response = self.send(request, full(Vec::new())).await?;
        let said = |name| response.headers().get(name)?.to_str().ok().map(str::to_owned);
        let greeting = Greeting {
            address: self.server.address.to_string(),
            version: said(rest::VERSION_HEADER),
            date: said(header::DATE.as_str()),
        };
        self.value(response).await?;
        Ok(greeting)
    }

    /// Reads.
    pub(crate) async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.json(Method::GET, path, None::<&()>).await
    }

    /// Asks for a change, with an idempotency key of its own. `Null` where there is nothing to tell.
    pub(crate) async fn post<T: Serialize>(&self, path: &str, body: &T) -> Result<Value, Failure> {
        self.json(Method::POST, path, Some(body)).await
    }

    /// Puts in place of what is there.
    pub(crate) async fn put<T: Serialize>(&self, path: &str, body: &T) -> Result<Value, Failure> {
        self.json(Method::PUT, path, Some(body)).await
    }

    /// Changes a part.
    pub(crate) async fn patch<T: Serialize>(&self, path: &str, body: &T) -> Result<Value, Failure> {
        self.json(Method::PATCH, path, Some(body)).await
    }

    /// Deletes.
    pub(crate) async fn delete(&self, path: &str) -> Result<Value, Failure> {
        self.json(Method::DELETE, path, None::<&()>).await
    }

    /// All items of a list, page by page, at most `items_max`.
    pub(crate) async fn list(&self, path: &str, items_max: usize) -> Result<Vec<Value>, Failure> {
        let mut items = Vec::new();
        let mut after = String::new();
        let more = if path.contains('?') { '&' } else { '?' };
        loop {
            let limit = PAGE_ITEMS.min(items_max - items.len());
            let mut page = self.get(&format!("{path}{more}limit={limit}{after}")).await?;
            if let Some(Value::Array(some)) = page.get_mut("items").map(Value::take) {
                items.extend(some);
            }
            match page["next"].as_str() {
                Some(next) if items.len() < items_max => after = format!("&after={next}"),
                _ => return Ok(items),
            }
        }
    }

    async fn json<T: Serialize>(&self, method: Method, path: &str, body: Option<&T>) -> Result<Value, Failure> {
        let bytes = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| Failure::of(Exit::Failed, &error))?,
            None => Vec::new(),
        };
        let mut request = self.request(method.clone(), path);
        if method != Method::GET {
            request = request.header("idempotency-key", Uuid::now_v7().to_string());
        }
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let response = self.send(request, full(bytes)).await?;
        self.value(response).await
    }

    /// The stream of events from after `after` on, or from now on.
    pub(crate) async fn events(&self, after: Option<u64>, follow: bool) -> Result<sse::Events, Failure> {
        let after = after.map(|after| format!("&after={after}")).unwrap_or_default();
        let request = self.request(Method::GET, &format!("/v1/events?follow={follow}{after}"));
        let response = self.send(request, full(Vec::new())).await?;
        match response.status() {
            StatusCode::OK => Ok(sse::Events::new(response.into_body())),
            _ => Err(self
                .value(response)
                .await
                .err()
                .unwrap_or_else(|| self.strange("it sent no events"))),
        }
    }

    /// Uploads a blob whose bytes come piece by piece.
    pub(crate) async fn put_blob(&self, digest: model::Digest, size_bytes: u64, body: Body) -> Result<(), Failure> {
        let request = self
            .request(Method::PUT, &format!("/v1/blobs/{digest}"))
            .header(header::CONTENT_LENGTH, size_bytes);
        // As long as bytes flow; the server ends an upload that stands still.
        let response = self.dispatch(request, body, None).await?;
        self.value(response).await.map(|_| ())
    }

    /// Whether the server has a blob.
    pub(crate) async fn has_blob(&self, digest: model::Digest, size_bytes: u64) -> Result<bool, Failure> {
        let request = self.request(Method::HEAD, &format!("/v1/blobs/{digest}?size_bytes={size_bytes}"));
        let response = self.send(request, full(Vec::new())).await?;
        match response.status() {
            StatusCode::NO_CONTENT => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            status => Err(self.strange(&format!("it answered {status}"))),
        }
    }

    /// A VM's serial console: bytes both ways.
    pub(crate) async fn console(&self, vm: &str) -> Result<TokioIo<hyper::upgrade::Upgraded>, Failure> {
        let mut sender = wire_http::http1(&self.server).await?;
        let request = self
            .request(Method::GET, &format!("/v1/vms/{vm}/console"))
            .header(header::HOST, self.server.address.to_string())
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, rest::CONSOLE_PROTOCOL);
        let mut request = request
            .body(full(Vec::new()))
            .map_err(|error| Failure::of(Exit::Usage, &error))?;
        *request.uri_mut() = format!("/v1/vms/{vm}/console")
            .parse()
            .map_err(|error| Failure::of(Exit::Usage, &error))?;
        let response = tokio::time::timeout(ANSWER_MAX, sender.send_request(request)).await;
        let response = response
            .map_err(|_| self.silent())?
            .map_err(|error| self.broken(&error))?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self
                .value(response)
                .await
                .err()
                .unwrap_or_else(|| self.strange("it opened no console")));
        }
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|error| self.broken(&error))?;
        Ok(TokioIo::new(upgraded))
    }

    fn request(&self, method: Method, path: &str) -> hyper::http::request::Builder {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("https://{}{path}", self.server.address))
            .header(header::USER_AGENT, concat!("godwit/", env!("CARGO_PKG_VERSION")));
        if let Some(bearer) = self.server.bearer() {
            request = request.header(header::AUTHORIZATION, bearer);
        }
        if let Some(project) = &self.server.project {
            request = request.header(rest::PROJECT_HEADER, project.to_string());
        }
        request
    }

    async fn send(&self, request: hyper::http::request::Builder, body: Body) -> Result<Response<Incoming>, Failure> {
        self.dispatch(request, body, Some(ANSWER_MAX)).await
    }

    async fn dispatch(
        &self,
        request: hyper::http::request::Builder,
        body: Body,
        limit: Option<Duration>,
    ) -> Result<Response<Incoming>, Failure> {
        let request = request.body(body).map_err(|error| Failure::of(Exit::Usage, &error))?;
        let mut sender = self.sender().await?;
        let answer = sender.send_request(request);
        let answer = match limit {
            Some(limit) => tokio::time::timeout(limit, answer).await.map_err(|_| self.silent())?,
            None => answer.await,
        };
        answer.map_err(|error| {
            self.sender.replace(None);
            self.broken(&error)
        })
    }

    async fn sender(&self) -> Result<SendRequest<Body>, Failure> {
        let known = self
            .sender
            .borrow()
            .as_ref()
            .filter(|sender| !sender.is_closed())
            .cloned();
        if let Some(sender) = known {
            return Ok(sender);
        }
        let sender = wire_http::http2(&self.server).await?;
        self.sender.replace(Some(sender.clone()));
        Ok(sender)
    }

    /// The body of an answer, or the problem that it is.
    async fn value(&self, response: Response<Incoming>) -> Result<Value, Failure> {
        let status = response.status();
        let version = response
            .headers()
            .get(rest::VERSION_HEADER)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let bytes = body.map_err(|error| self.broken(&*error))?.to_bytes();
        if status.is_success() && bytes.is_empty() {
            return Ok(Value::Null);
        }
        let unknown = |what: String| match &version {
            Some(version) => self.strange(&format!(
                "it is godwit {version}, this is {}, and {what}",
                env!("CARGO_PKG_VERSION")
            )),
            None => self.strange(&format!("it does not say that it is godwit, and {what}")),
        };
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| unknown(format!("its answer is no JSON: {error}")));
        }
        let Ok(problem) = serde_json::from_slice::<Problem>(&bytes) else {
            return Err(unknown(format!("it answered {status}")));
        };
        let operation = problem.operation;
        let unauthenticated = problem.code == model::Code::Unauthenticated;
        let mut failure = Failure::from(problem.into_refusal());
        if unauthenticated && !self.server.token_from.is_empty() {
            failure = failure.hint(format!(
                "the token is from {}; use --token-file with another, or log in: `godwit login`",
                self.server.token_from
            ));
        }
        Err(match operation {
            Some(operation) => failure.about(operation),
            None => failure,
        })
    }

    fn strange(&self, why: &str) -> Failure {
        let message = format!(
            "the server at {} is not one that this program knows: {why}",
            self.server.address
        );
        Failure::new(Exit::Unreachable, message).hint("check the address, or use a godwit of the server's version")
    }

    fn broken(&self, error: &dyn std::error::Error) -> Failure {
        let message = format!(
            "the connection to the server at {} broke: {}",
            self.server.address,
            chain(error)
        );
        Failure::new(Exit::Unreachable, message).hint("try again; what was accepted goes on: godwit op list")
    }

    fn silent(&self) -> Failure {
        let message = format!(
            "the server at {} did not answer within {} s",
            self.server.address,
            ANSWER_MAX.as_secs()
        );
        Failure::new(Exit::Unreachable, message).hint("try again; what was accepted goes on: godwit op list")
    }
}

/// A body at hand.
fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes))
        .map_err(|never| match never {})
        .boxed_unsync()
}
