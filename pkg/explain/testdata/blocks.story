# Address blocks: exact arithmetic, each in its own family.
policy web: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.128/25]}}], ports: [{port: http}]}]}
? 203.0.113.7 shop/web-1 8080/TCP
allowed: 203.0.113.7 -> shop/web-1 (10.0.0.1), port 8080/TCP
  ingress of shop/web-1: allowed: a policy admits this
    shop/web: ingress[0] admits: from[0] holds 203.0.113.7 in 203.0.113.0/24, port http/TCP
=> yes
? 203.0.113.200 shop/web-1 8080/TCP
denied: 203.0.113.200 -> shop/web-1 (10.0.0.1), port 8080/TCP
  ingress of shop/web-1: denied: one policy isolates it, and does not admit this
    shop/web: ingress[0] does not: from[0] wants 203.0.113.0/24 except 203.0.113.128/25
=> no
? 203.0.113.7 shop/web-2 8080/TCP
denied: 203.0.113.7 -> shop/web-2 (10.0.0.2), port 8080/TCP
  ingress of shop/web-2: denied: one policy isolates it, and does not admit this
    shop/web: ingress[0] does not: from[0] holds 203.0.113.7 in 203.0.113.0/24, but wants port http/TCP, not 8080/TCP
=> no
? 2001:db8::7 shop/web-1 8080/TCP
denied: 2001:db8::7 -> shop/web-1 (fd00::1), port 8080/TCP
  ingress of shop/web-1: denied: one policy isolates it, and does not admit this
    shop/web: ingress[0] does not: from[0] wants 203.0.113.0/24
=> no

# A second block gives back what the first one's exception leaves out.
policy web: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/24, except: [203.0.113.128/25]}}, {ipBlock: {cidr: 203.0.113.200/32}}]}]}
? 203.0.113.200 shop/web-1 8080/TCP
allowed: 203.0.113.200 -> shop/web-1 (10.0.0.1), port 8080/TCP
  ingress of shop/web-1: allowed: a policy admits this
    shop/web: ingress[0] admits: from[1] holds 203.0.113.200 in 203.0.113.200/32, every port
=> yes
? 203.0.113.201 shop/web-1 8080/TCP
denied: 203.0.113.201 -> shop/web-1 (10.0.0.1), port 8080/TCP
  ingress of shop/web-1: denied: one policy isolates it, and does not admit this
    shop/web: ingress[0] does not: from[0] wants 203.0.113.0/24 except 203.0.113.128/25; from[1] wants 203.0.113.200/32
=> no

# A policy that cannot be used as written closes what it selects, and says why.
policy broken: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress, Egress], ingress: [{from: [{ipBlock: {cidr: 203.0.113.0/33}}]}], egress: [{ports: [{port: 90, endPort: 80}]}]}
? 203.0.113.7 shop/db 5432/TCP
denied: 203.0.113.7 -> shop/db (10.0.0.3), port 5432/TCP
  ingress of shop/db: denied: one policy isolates it, and does not admit this
    shop/broken: cannot be used as written, so it admits nothing: ingress[0] has cidr "203.0.113.0/33", which is none; egress[0] has endPort 80, which ends no range
=> no
? shop/db 203.0.113.7 443/TCP
denied: shop/db (10.0.0.3) -> 203.0.113.7, port 443/TCP
  egress of shop/db: denied: one policy isolates it, and does not admit this
    shop/broken: cannot be used as written, so it admits nothing: ingress[0] has cidr "203.0.113.0/33", which is none; egress[0] has endPort 80, which ends no range
=> no
