//! As much of HTTP/1.1 as the metadata service needs (RFC 9112): requests without bodies, answers with a length.

/// Longest request.
pub(crate) const REQUEST_BYTES_MAX: usize = 8 << 10;
const HEADERS_MAX: usize = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Head,
    Put,
    Other,
}

/// A request, by what counts of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// Without its query.
    pub(crate) path: String,
    pub(crate) token: Option<String>,
    pub(crate) ttl: Option<String>,
    /// Somebody passed it on for another.
    pub(crate) forwarded: bool,
    /// Its client waits for the connection's end.
    pub(crate) close: bool,
}

/// What bytes are so far.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed {
    /// Not yet a request.
    More,
    /// A request, and how many bytes it has.
    Request(Request, usize),
    /// Nothing that is served: with this status.
    Bad(u16),
}

/// Reads a request from the beginning of these bytes.
pub(crate) fn parse(bytes: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < REQUEST_BYTES_MAX => return Parsed::More,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => return Parsed::Bad(431),
        Err(_) => return Parsed::Bad(400),
    };
    let method = match request.method {
        Some("GET") => Method::Get,
        Some("HEAD") => Method::Head,
        Some("PUT") => Method::Put,
        _ => Method::Other,
    };
    let target = request.path.unwrap_or_default();
    let mut read = Request {
        method,
        path: target.split(['?', '#']).next().unwrap_or_default().to_owned(),
        token: None,
        ttl: None,
        forwarded: false,
        close: request.version == Some(0),
    };
    for header in request.headers.iter() {
        let Ok(value) = std::str::from_utf8(header.value) else {
            return Parsed::Bad(400);
        };
        let value = value.trim();
        match header.name.to_ascii_lowercase().as_str() {
            // A body would be taken for the next request.
            "content-length" if value != "0" => return Parsed::Bad(413),
            "transfer-encoding" => return Parsed::Bad(413),
            "x-forwarded-for" | "forwarded" => read.forwarded = true,
            "x-aws-ec2-metadata-token" => read.token = Some(value.to_owned()),
            "x-aws-ec2-metadata-token-ttl-seconds" => read.ttl = Some(value.to_owned()),
            "connection" if value.eq_ignore_ascii_case("close") => read.close = true,
            _ => {}
        }
    }
    Parsed::Request(read, length)
}

/// An answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) json: bool,
    pub(crate) body: Vec<u8>,
    /// How long the token in it is good, seconds. It goes no further than the guest itself.
    pub(crate) ttl_s: Option<u32>,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        let body = format!("{status} {}\n", reason(status)).into_bytes();
        Self {
            status,
            body,
            ..Self::default()
        }
    }

    /// The bytes of it.
    pub(crate) fn bytes(&self, head_only: bool, close: bool) -> Vec<u8> {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\nServer: godwit\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\n",
            self.status,
            reason(self.status),
            if self.json { "application/json" } else { "text/plain" },
            self.body.len()
        );
        if let Some(ttl_s) = self.ttl_s {
            head += &format!("X-aws-ec2-metadata-token-ttl-seconds: {ttl_s}\r\n");
        }
        if self.status == 405 {
            head += "Allow: GET, HEAD, PUT\r\n";
        }
        head += if close { "Connection: close\r\n\r\n" } else { "\r\n" };
        let mut bytes = head.into_bytes();
        if !head_only {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

const fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        _ => "Service Unavailable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_are_read_whole_and_bodies_are_not_served() {
        let bytes =
            b"PUT /latest/api/token?x HTTP/1.1\r\nHost: a\r\nX-AWS-EC2-Metadata-Token-TTL-Seconds: 60\r\n\r\nGET";
        let Parsed::Request(request, length) = parse(bytes) else {
            panic!("no request")
        };
        assert_eq!(
            (request.method, request.path.as_str()),
            (Method::Put, "/latest/api/token")
        );
        assert_eq!((request.ttl.as_deref(), length), (Some("60"), bytes.len() - 3));
        assert_eq!(parse(&bytes[..40]), Parsed::More);
        let bad = |text: &str| parse(text.as_bytes());
        assert_eq!(bad("GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n"), Parsed::Bad(413));
        assert_eq!(
            bad("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"),
            Parsed::Bad(413)
        );
        assert_eq!(
            bad(&format!("GET / HTTP/1.1\r\nA: {}", "a".repeat(REQUEST_BYTES_MAX))),
            Parsed::Bad(431)
        );
        assert_eq!(
            bad(&format!("GET / HTTP/1.1\r\n{}\r\n", "A: a\r\n".repeat(40))),
            Parsed::Bad(431)
        );
        assert_eq!(bad("\u{1}\u{2}\r\n\r\n"), Parsed::Bad(400));
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = parse(&bytes);
        }
    }
}
