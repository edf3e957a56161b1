//! The smallest HTTP/1.1 client that measures honestly: no retries, no
//! redirects, one request at a time on a connection, every byte bounded.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};

/// Longest body that is kept.
const BODY_MAX: usize = 1 << 20;
/// Longest head, status line included.
const HEAD_MAX: usize = 16 << 10;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The whole body.
    pub body: Vec<u8>,
    /// Whether the connection may carry another request.
    pub keep_alive: bool,
}

/// What a head says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) length: u64,
    pub(crate) keep_alive: bool,
}

/// A keep-alive connection for asynchronous clients.
#[derive(Debug)]
pub struct Connection {
    stream: tokio::io::BufReader<tokio::net::TcpStream>,
}

impl Connection {
    /// Connects to port 80.
    ///
    /// # Errors
    /// As TCP's.
    pub async fn open(ip: Ipv4Addr) -> Result<Connection> {
        let stream = tokio::net::TcpStream::connect((ip, 80)).await.context("connect")?;
        stream.set_nodelay(true).context("set TCP_NODELAY")?;
        Ok(Connection {
            stream: tokio::io::BufReader::new(stream),
        })
    }

    /// One request, one answer.
    ///
    /// # Errors
    /// When the connection breaks or the answer is not HTTP.
    pub async fn ask(&mut self, method: &str, target: &str) -> Result<Answer> {
        let request = request(method, target);
        self.stream.write_all(request.as_bytes()).await.context("send")?;
        let mut head = Vec::new();
        loop {
            let before = head.len();
            let limit = (HEAD_MAX - before) as u64;
            let mut bounded = (&mut self.stream).take(limit);
            let read = bounded.read_until(b'\n', &mut head).await.context("receive")?;
            if read == 0 {
                bail!("the connection closed before the answer's head ended");
            }
            if matches!(&head[before..], b"\r\n" | b"\n") {
                break;
            }
        }
        let head = parse_head(&head)?;
        let length = usize::try_from(head.length).ok().filter(|length| *length <= BODY_MAX);
        let mut body = vec![0; length.context("the answer is too long")?];
        self.stream.read_exact(&mut body).await.context("receive")?;
        Ok(Answer {
            status: head.status,
            body,
            keep_alive: head.keep_alive,
        })
    }
}

/// One request from the network namespace at `netns`, on a connection of its
/// own; returns the body of a 2xx answer.
///
/// # Errors
/// When it is not answered within `limit`, or by another status.
pub fn ask(netns: &Path, ip: Ipv4Addr, method: &str, target: &str, limit: Duration) -> Result<String> {
    let netns = netns.to_owned();
    let (method, target) = (method.to_owned(), target.to_owned());
    let asked = std::thread::spawn(move || -> Result<String> {
        crate::probe::enter_netns(&netns)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start a client")?;
        let answer = runtime.block_on(async {
            tokio::time::timeout(limit, async { Connection::open(ip).await?.ask(&method, &target).await }).await
        });
        let answer = answer
            .with_context(|| {
                format!(
                    "{method} http://{ip}{target}: no answer within {} ms",
                    limit.as_millis()
                )
            })?
            .with_context(|| format!("{method} http://{ip}{target}"))?;
        let body = String::from_utf8_lossy(&answer.body).into_owned();
        if answer.status / 100 != 2 {
            bail!("{method} http://{ip}{target}: {} {}", answer.status, body.trim());
        }
        Ok(body)
    });
    match asked.join() {
        Ok(body) => body,
        Err(_) => bail!("the client's thread panicked"),
    }
}

/// Sends a GET and returns the body's reader and length, for what is too long to keep.
pub(crate) fn get_stream(ip: Ipv4Addr, target: &str, silence: Duration) -> Result<(impl Read + use<>, u64)> {
    let address = SocketAddrV4::new(ip, 80).into();
    let mut stream = TcpStream::connect_timeout(&address, silence).context("connect")?;
    stream.set_read_timeout(Some(silence)).context("set a timeout")?;
    stream.write_all(request("GET", target).as_bytes()).context("send")?;
    let mut reader = BufReader::with_capacity(64 << 10, stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let limit = (HEAD_MAX - head.len()) as u64;
        if reader
            .by_ref()
            .take(limit)
            .read_until(b'\n', &mut head)
            .context("receive")?
            == 0
        {
            bail!("the connection closed before the answer's head ended");
        }
    }
    let head = parse_head(&head)?;
    if head.status != 200 {
        bail!("GET http://{ip}{target}: status {}", head.status);
    }
    Ok((reader, head.length))
}

fn request(method: &str, target: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nHost: guest\r\nContent-Length: 0\r\n\r\n")
}

/// Parses a status line and headers.
pub(crate) fn parse_head(head: &[u8]) -> Result<Head> {
    let text = std::str::from_utf8(head).context("the answer's head is not text")?;
    let mut lines = text.lines();
    let first = lines.next().unwrap_or_default();
    let status = first
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3)?.parse().ok());
    let mut parsed = Head {
        status: status.with_context(|| format!("`{first}` is not an HTTP/1.1 status line"))?,
        length: 0,
        keep_alive: true,
    };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            parsed.length = value
                .parse()
                .with_context(|| format!("content-length `{value}` is no number"))?;
        } else if name.eq_ignore_ascii_case("connection") {
            parsed.keep_alive = !value.eq_ignore_ascii_case("close");
        }
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_whatever_its_letters_case() {
        let head = parse_head(b"HTTP/1.1 200 OK\r\ncontent-LENGTH: 12\r\nConnection: close\r\n\r\n").unwrap();
        assert_eq!(
            head,
            Head {
                status: 200,
                length: 12,
                keep_alive: false
            }
        );
    }

    #[test]
    fn what_is_not_http_is_refused() {
        for bad in [
            &b""[..],
            b"SSH-2.0",
            b"HTTP/1.1 2",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"\xff\xfe",
        ] {
            assert!(parse_head(bad).is_err(), "{bad:?}");
        }
    }
}
