//! The API as a stranger to Godwit's own client would use it: raw bytes over TLS, one request a connection, and the stream of
//! events.

use crate::cluster::Cluster;
use anyhow::{Context, Result, bail, ensure};
use identity::CaCertificate;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Longest silence of the server in an answer.
const SILENCE: Duration = Duration::from_secs(40);
/// Longest answer that is read.
const ANSWER_BYTES_MAX: u64 = 8 << 20;
/// Events that wait to be looked at.
const EVENTS_KEPT: usize = 4096;

type Tls = StreamOwned<ClientConnection, TcpStream>;

/// How to reach a cluster's API.
#[derive(Clone, Debug)]
pub struct Api {
    address: SocketAddr,
    config: Arc<ClientConfig>,
    token: String,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// The head's lines, without the status line.
    pub head: Vec<String>,
    /// The body, its chunks put together.
    pub body: Vec<u8>,
}

impl Api {
    /// The API of a cluster whose controller runs, with its first token.
    ///
    /// # Errors
    /// When the controller's files cannot be read.
    pub fn of(cluster: &Cluster) -> Result<Api> {
        let state = cluster.state();
        let read = |name: &str| fs::read_to_string(state.join(name)).with_context(|| format!("cannot read {name}"));
        let authority = CaCertificate::from_pem(read("ca.pem")?.as_bytes()).context("ca.pem")?;
        let mut config = identity::tls::to_api(&authority).context("cannot set up TLS")?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Api {
            address: cluster.api_address(),
            config: Arc::new(config),
            token: read("admin.token")?.trim().to_owned(),
        })
    }

    /// The address that requests name.
    pub fn authority(&self) -> String {
        self.address.to_string()
    }

    /// The header line with the token.
    pub fn bearer(&self) -> String {
        format!("Authorization: Bearer {}", self.token)
    }

    /// The token itself.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Sends these bytes and reads one answer.
    ///
    /// # Errors
    /// When the server does not answer, or not in HTTP.
    pub fn raw(&self, request: &[u8]) -> Result<Reply> {
        let mut stream = self.connect()?;
        // A server that refuses early may close while we still send; its answer counts.
        let sent = stream.write_all(request).and_then(|()| stream.flush());
        let mut reader = BufReader::new(Incoming(stream));
        let (status, head) = match head(&mut reader) {
            Ok(read) => read,
            Err(error) => return Err(error.context(format!("no answer (sending ended {sent:?})"))),
        };
        let body = body(reader, &head)?;
        Ok(Reply { status, head, body })
    }

    /// One request with the token and further header lines.
    ///
    /// # Errors
    /// As [`Api::raw`].
    pub fn ask(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Result<Reply> {
        let mut lines = vec![
            format!("Host: {}", self.authority()),
            self.bearer(),
            "Connection: close".into(),
        ];
        if !body.is_empty() {
            lines.push("Content-Type: application/json".into());
            lines.push(format!("Content-Length: {}", body.len()));
        }
        lines.extend(headers.iter().map(|line| (*line).to_owned()));
        let text = format!("{method} {path} HTTP/1.1\r\n{}\r\n\r\n{body}", lines.join("\r\n"));
        self.raw(text.as_bytes()).with_context(|| format!("{method} {path}"))
    }

    /// Uploads a blob and returns its digest.
    ///
    /// # Errors
    /// When it is refused.
    pub fn upload(&self, bytes: &[u8]) -> Result<String> {
        let digest: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let head = format!(
            "PUT /v1/blobs/{digest} HTTP/1.1\r\nHost: {}\r\n{}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            self.authority(),
            self.bearer(),
            bytes.len()
        );
        let reply = self.raw(&[head.as_bytes(), bytes].concat())?;
        let said = String::from_utf8_lossy(&reply.body);
        ensure!(reply.status == 204, "the blob is refused with {}: {said}", reply.status);
        Ok(digest)
    }

    /// The stream of events, after event `after` or from now on.
    ///
    /// # Errors
    /// When it is refused.
    pub fn events(&self, after: Option<u64>) -> Result<Events> {
        let mut stream = self.connect()?;
        let resume = after.map(|id| format!("Last-Event-ID: {id}\r\n")).unwrap_or_default();
        let request = format!(
            "GET /v1/events HTTP/1.1\r\nHost: {}\r\n{}\r\n{resume}\r\n",
            self.authority(),
            self.bearer()
        );
        stream.write_all(request.as_bytes()).context("cannot ask for events")?;
        let mut reader = BufReader::new(stream);
        let (status, head) = head(&mut reader)?;
        ensure!(status == 200, "the stream of events is refused with {status}");
        ensure!(is_chunked(&head), "the stream of events is not chunked");
        let (sender, events) = sync_channel(EVENTS_KEPT);
        thread::Builder::new()
            .name("events".into())
            .spawn(move || read_events(BufReader::new(Chunked::new(reader)), &sender))
            .context("cannot start a thread")?;
        Ok(Events { events })
    }

    fn connect(&self) -> Result<Tls> {
        let stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(5))
            .with_context(|| format!("cannot connect to {}", self.address))?;
        stream.set_read_timeout(Some(SILENCE)).context("cannot set a timeout")?;
        stream
            .set_write_timeout(Some(SILENCE))
            .context("cannot set a timeout")?;
        stream.set_nodelay(true).context("cannot set TCP_NODELAY")?;
        let name = ServerName::IpAddress(self.address.ip().into());
        let connection = ClientConnection::new(self.config.clone(), name).context("cannot begin TLS")?;
        Ok(StreamOwned::new(connection, stream))
    }
}

impl Reply {
    /// The body as JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// Whether it is a typed refusal with this status and code: `application/problem+json`, one line of detail, no word of ours
    /// about the inside. Returns the detail.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn refused(&self, status: u16, code: &str) -> Result<String> {
        let text = String::from_utf8_lossy(&self.body);
        ensure!(
            self.status == status,
            "answered {} instead of {status}: {text}",
            self.status
        );
        let kind = self.header("content-type").unwrap_or_default();
        ensure!(kind == "application/problem+json", "its content type is {kind}: {text}");
        let problem = self.json()?;
        ensure!(
            problem["code"] == code,
            "its code is {} instead of {code}: {text}",
            problem["code"]
        );
        ensure!(problem["status"] == status, "its body says another status: {text}");
        let detail = problem["detail"].as_str().unwrap_or_default().to_owned();
        ensure!(
            !detail.is_empty() && !detail.contains('\n'),
            "its detail is not one line: {detail:?}"
        );
        ensure!(
            !detail.chars().any(char::is_control),
            "its detail has control characters: {detail:?}"
        );
        Ok(detail)
    }
}

/// One server-sent event.
#[derive(Clone, Debug)]
pub struct Event {
    /// `notice`, `progress` or `lagged`.
    pub kind: String,
    /// Its sequence number; progress has none.
    pub id: Option<u64>,
    /// What it says.
    pub data: Value,
}

/// A stream of events. Dropping it leaves its reader until the connection ends.
#[derive(Debug)]
pub struct Events {
    events: Receiver<Event>,
}

impl Events {
    /// Waits for an event that is wanted; others are dropped.
    ///
    /// # Errors
    /// When none comes within `limit`, or the stream ends.
    pub fn wait(&self, limit: Duration, mut wanted: impl FnMut(&Event) -> bool) -> Result<Event> {
        let end = Instant::now() + limit;
        let mut seen = 0;
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(event) if wanted(&event) => return Ok(event),
                Ok(_) => seen += 1,
                Err(RecvTimeoutError::Timeout) => {
                    bail!(
                        "the event did not come within {} s (among {seen} others)",
                        limit.as_secs()
                    )
                }
                Err(RecvTimeoutError::Disconnected) => bail!("the stream of events ended (after {seen} events)"),
            }
        }
    }

    /// Waits for a notice of this kind about the thing with this name.
    ///
    /// # Errors
    /// As [`Events::wait`].
    pub fn notice(&self, limit: Duration, what: &str, name: &str) -> Result<Event> {
        let wanted = |event: &Event| event.kind == "notice" && event.data["what"] == what && event.data["name"] == name;
        self.wait(limit, wanted)
            .with_context(|| format!("waiting for {what} of {name}"))
    }
}

fn head(reader: &mut impl BufRead) -> Result<(u16, Vec<String>)> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        let read = reader
            .take(64 << 10)
            .read_line(&mut line)
            .context("cannot read an answer")?;
        ensure!(read > 0, "the connection closed before the answer's head ended");
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    ensure!(!lines.is_empty(), "the answer has no status line");
    let first = lines.remove(0);
    let status = first
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3)?.parse().ok());
    Ok((
        status.with_context(|| format!("no status line of HTTP/1.1: {first}"))?,
        lines,
    ))
}

fn header<'a>(head: &'a [String], name: &str) -> Option<&'a str> {
    head.iter().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

fn is_chunked(head: &[String]) -> bool {
    header(head, "transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"))
}

fn body(reader: impl BufRead, head: &[String]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let length = header(head, "content-length").and_then(|value| value.parse::<u64>().ok());
    let read = match length {
        _ if is_chunked(head) => Chunked::new(reader).take(ANSWER_BYTES_MAX).read_to_end(&mut bytes),
        Some(length) => reader.take(length.min(ANSWER_BYTES_MAX)).read_to_end(&mut bytes),
        None => reader.take(ANSWER_BYTES_MAX).read_to_end(&mut bytes),
    };
    match read {
        // Without a length the end of the connection ends the body; TLS may leave out its farewell.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof && length.is_none() => {}
        other => drop(other.context("cannot read an answer's body")?),
    }
    Ok(bytes)
}

fn read_events(reader: impl BufRead, sender: &SyncSender<Event>) {
    let (mut kind, mut id, mut data) = (String::new(), None, String::new());
    for line in reader.lines() {
        let Ok(line) = line else { return };
        match line.split_once(':') {
            Some(("event", value)) => value.trim().clone_into(&mut kind),
            Some(("id", value)) => id = value.trim().parse().ok(),
            Some(("data", value)) => data.push_str(value.trim()),
            _ if line.is_empty() && !data.is_empty() => {
                let event = Event {
                    kind: std::mem::take(&mut kind),
                    id: id.take(),
                    data: serde_json::from_str(&data).unwrap_or(Value::Null),
                };
                data.clear();
                if sender.send(event).is_err() {
                    return;
                }
            }
            _ => {}
        }
    }
}

/// What the server says, whether or not it still takes what we say: rustls' own stream would first finish writing.
struct Incoming(Tls);

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Tls { conn, sock } = &mut self.0;
        loop {
            match conn.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    conn.read_tls(sock)?;
                    conn.process_new_packets().map_err(io::Error::other)?;
                }
                read => return read,
            }
        }
    }
}

/// Reads the data out of chunks (RFC 9112, 7.1).
struct Chunked<R> {
    inner: R,
    left: u64,
    over: bool,
}

impl<R: BufRead> Chunked<R> {
    fn new(inner: R) -> Self {
        Chunked {
            inner,
            left: 0,
            over: false,
        }
    }

    fn next_chunk(&mut self) -> io::Result<()> {
        let mut line = String::new();
        (&mut self.inner).take(1024).read_line(&mut line)?;
        if line.trim().is_empty() {
            line.clear();
            (&mut self.inner).take(1024).read_line(&mut line)?;
        }
        let digits = line.trim().split(';').next().unwrap_or_default();
        self.left = u64::from_str_radix(digits, 16)
            .map_err(|_| io::Error::new(ErrorKind::InvalidData, format!("no chunk's size: {line:?}")))?;
        self.over = self.left == 0;
        Ok(())
    }
}

impl<R: BufRead> Read for Chunked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 && !self.over {
            self.next_chunk()?;
        }
        if self.over {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.inner.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_put_together_and_a_cut_is_an_error() {
        let mut text = String::new();
        Chunked::new(&b"4\r\nabcd\r\n2;x=y\r\nef\r\n0\r\n\r\n"[..])
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "abcdef");
        assert!(Chunked::new(&b"4\r\nab"[..]).read_to_string(&mut text).is_err());
    }

    #[test]
    fn events_are_read_with_their_ids() {
        let (sender, events) = sync_channel(8);
        let text = "event: notice\nid: 7\ndata: {\"what\":\"vm.active\"}\n\n: beat\n\nevent: progress\ndata: {}\n\n";
        read_events(text.as_bytes(), &sender);
        let first = events.try_recv().unwrap();
        assert_eq!((first.kind.as_str(), first.id), ("notice", Some(7)));
        assert_eq!(events.try_recv().unwrap().id, None);
    }

    #[test]
    fn a_refusal_without_a_code_is_none() {
        let reply = |body: &str| Reply {
            status: 400,
            head: vec!["Content-Type: application/problem+json".into()],
            body: body.into(),
        };
        let good = r#"{"code":"invalid-input","status":400,"detail":"no"}"#;
        assert_eq!(reply(good).refused(400, "invalid-input").unwrap(), "no");
        assert!(reply(good).refused(409, "busy").is_err());
        assert!(
            reply(r#"{"status":400,"detail":"no"}"#)
                .refused(400, "invalid-input")
                .is_err()
        );
        assert!(
            reply(r#"{"code":"invalid-input","status":400,"detail":"a\nb"}"#)
                .refused(400, "invalid-input")
                .is_err()
        );
    }
}
