# A database that admits web servers alone, on its own port.

? shop/web-1 shop/db 5432/TCP
allowed: shop/web-1 (10.0.0.1) -> shop/db (10.0.0.3), port 5432/TCP
  egress of shop/web-1: allowed: no policy isolates it
  ingress of shop/db: allowed: no policy isolates it
allowed: shop/web-1 (fd00::1) -> shop/db (fd00::3), port 5432/TCP
  egress of shop/web-1: allowed: no policy isolates it
  ingress of shop/db: allowed: no policy isolates it
=> yes

# First everything is closed.
policy deny: {podSelector: {}, policyTypes: [Ingress]}
? shop/web-1 shop/db 5432/TCP
denied: shop/web-1 (10.0.0.1) -> shop/db (10.0.0.3), port 5432/TCP
  egress of shop/web-1: allowed: no policy isolates it
  ingress of shop/db: denied: one policy isolates it, and does not admit this
    shop/deny: has no ingress rule: it admits nothing
denied: shop/web-1 (fd00::1) -> shop/db (fd00::3), port 5432/TCP
  egress of shop/web-1: allowed: no policy isolates it
  ingress of shop/db: denied: one policy isolates it, and does not admit this
    shop/deny: has no ingress rule: it admits nothing
=> no

# Then one policy opens what is wanted; policies only add.
policy db: {podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: sql}]}]}
? shop/web-1 shop/db 5432/TCP
allowed: shop/web-1 (10.0.0.1) -> shop/db (10.0.0.3), port 5432/TCP
  egress of shop/web-1: allowed: no policy isolates it
  ingress of shop/db: allowed: a policy admits this
    shop/deny: has no ingress rule: it admits nothing
    shop/db: ingress[0] admits: from[0] matches shop/web-1, port sql/TCP
allowed: shop/web-1 (fd00::1) -> shop/db (fd00::3), port 5432/TCP
  egress of shop/web-1: allowed: no policy isolates it
  ingress of shop/db: allowed: a policy admits this
    shop/deny: has no ingress rule: it admits nothing
    shop/db: ingress[0] admits: from[0] matches shop/web-1, port sql/TCP
=> yes
? shop/web-2 shop/db 5432/UDP
denied: shop/web-2 (10.0.0.2) -> shop/db (10.0.0.3), port 5432/UDP
  egress of shop/web-2: allowed: no policy isolates it
  ingress of shop/db: denied: 2 policies isolate it, and none admits this
    shop/deny: has no ingress rule: it admits nothing
    shop/db: ingress[0] does not: from[0] matches shop/web-2, but wants port sql/TCP, not 5432/UDP
=> no
? shop/cart shop/db 5432/TCP
denied: shop/cart (no address yet) -> shop/db (10.0.0.3), port 5432/TCP
  egress of shop/cart: allowed: no policy isolates it
  ingress of shop/db: denied: 2 policies isolate it, and none admits this
    shop/deny: has no ingress rule: it admits nothing
    shop/db: ingress[0] does not: from[0] wants pods with (app=web), and shop/cart has (app=cart)
denied: shop/cart (no address yet) -> shop/db (fd00::3), port 5432/TCP
  egress of shop/cart: allowed: no policy isolates it
  ingress of shop/db: denied: 2 policies isolate it, and none admits this
    shop/deny: has no ingress rule: it admits nothing
    shop/db: ingress[0] does not: from[0] wants pods with (app=web), and shop/cart has (app=cart)
=> no
? lab/tools shop/db 5432/TCP
denied: lab/tools (10.0.0.9) -> shop/db (10.0.0.3), port 5432/TCP
  egress of lab/tools: allowed: no policy isolates it
  ingress of shop/db: denied: 2 policies isolate it, and none admits this
    shop/deny: has no ingress rule: it admits nothing
    shop/db: ingress[0] does not: from[0] selects pods of namespace shop alone
=> no
? 203.0.113.7 shop/db 5432/TCP
denied: 203.0.113.7 -> shop/db (10.0.0.3), port 5432/TCP
  ingress of shop/db: denied: 2 policies isolate it, and none admits this
    shop/deny: has no ingress rule: it admits nothing
    shop/db: ingress[0] does not: from[0] selects pods, and 203.0.113.7 is none
=> no

# The node's probes and the pod's own connections need no policy.
? 192.0.2.10 shop/db 5432/TCP
allowed: 192.0.2.10 (the node) -> shop/db (10.0.0.3), port 5432/TCP
  a node always reaches its own pods
=> yes
? shop/db shop/db 5432/TCP
allowed: shop/db (10.0.0.3) -> shop/db (10.0.0.3), port 5432/TCP
  a pod always reaches itself
allowed: shop/db (fd00::3) -> shop/db (fd00::3), port 5432/TCP
  a pod always reaches itself
=> yes

# Without the general denial nothing changes for the database: its own policy isolates it.
policy deny: none
? shop/cart shop/db 5432/TCP
denied: shop/cart (no address yet) -> shop/db (10.0.0.3), port 5432/TCP
  egress of shop/cart: allowed: no policy isolates it
  ingress of shop/db: denied: one policy isolates it, and does not admit this
    shop/db: ingress[0] does not: from[0] wants pods with (app=web), and shop/cart has (app=cart)
denied: shop/cart (no address yet) -> shop/db (fd00::3), port 5432/TCP
  egress of shop/cart: allowed: no policy isolates it
  ingress of shop/db: denied: one policy isolates it, and does not admit this
    shop/db: ingress[0] does not: from[0] wants pods with (app=web), and shop/cart has (app=cart)
=> no
? shop/cart shop/web-2 8080/TCP
allowed: shop/cart (no address yet) -> shop/web-2 (10.0.0.2), port 8080/TCP
  egress of shop/cart: allowed: no policy isolates it
  ingress of shop/web-2: allowed: no policy isolates it
=> yes
