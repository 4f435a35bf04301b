package main // go run embed.go 127.0.0.1:6379 user password "a text" "another"
import (
	"bufio"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"os"
	"time"
)

type fields = map[string]any

func main() {
	random, line := make([]byte, 16), []byte{}
	rand.Read(random)
	id := fmt.Sprintf("%x", random)
	body, _ := json.Marshal([]any{[]any{os.Args[4:]}, fields{}, fields{}}) // []byte becomes base64 below
	headers := fields{"task": "tasks.embed", "id": id, "lang": "go", "argsrepr": "texts", "kwargsrepr": "{}", "embedq-answer": "json"}
	properties := fields{"correlation_id": id, "delivery_tag": id, "body_encoding": "base64", "delivery_info": fields{"exchange": "", "routing_key": "embed"}}
	job, _ := json.Marshal(fields{"body": body, "content-type": "application/json", "content-encoding": "utf-8", "headers": headers, "properties": properties})
	server, err := net.Dial("tcp", os.Args[1])
	for _, words := range [][]string{{"HELLO", "3", "AUTH", os.Args[2], os.Args[3]}, {"SUBSCRIBE", "celery-task-meta-" + id}, {"LPUSH", "embed", string(job)}} {
		fmt.Fprintf(server, "*%d\r\n", len(words))
		for _, word := range words {
			fmt.Fprintf(server, "$%d\r\n%s\r\n", len(word), word)
		}
	}
	server.SetReadDeadline(time.Now().Add(time.Minute))
	var answer struct{ Result fields } // other lines of the server are no JSON objects, and leave it empty
	for lines := bufio.NewReader(server); err == nil && answer.Result == nil; json.Unmarshal(line, &answer) {
		line, err = lines.ReadBytes('\n')
	}
	dense := answer.Result["dense"].(fields) // panics for a failure, whose result has "exc_message"
	data, _ := base64.StdEncoding.DecodeString(dense["data"].(string))
	fmt.Printf("%v %.6f\n", dense["shape"], math.Float32frombits(binary.LittleEndian.Uint32(data)))
}
